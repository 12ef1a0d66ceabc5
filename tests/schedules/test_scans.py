"""Paths over the grid."""

import pytest
import torch

from vgen.errors import UserError
from vgen.schedules.diagonal import diagonal
from vgen.schedules.scans import SCANS, scan_order

WORKED = {
    "raster": [0, 1, 2, 3, 4, 5, 6, 7, 8],
    "alternate": [0, 1, 2, 5, 4, 3, 6, 7, 8],
    "column": [0, 3, 6, 1, 4, 7, 2, 5, 8],
    "zigzag": [0, 1, 3, 6, 4, 2, 5, 7, 8],
    "zigzag-down": [0, 3, 1, 2, 4, 6, 7, 5, 8],
    "subsample": [0, 2, 6, 8, 1, 7, 3, 5, 4],
    "spiral-in": [0, 1, 2, 5, 8, 7, 6, 3, 4],
    "spiral-out": [4, 3, 6, 7, 8, 5, 2, 1, 0],
}


@pytest.mark.parametrize("name", sorted(WORKED))
def test_worked_examples(name):
    assert scan_order(name, (3, 3), key="scan").tolist() == WORKED[name]


def test_the_z_curve_walks_quarters():
    assert scan_order("z-curve", (4, 4), key="scan").tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


@pytest.mark.parametrize("name", sorted(SCANS))
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (3, 5), (6, 4), (7, 7), (2, 3, 4)])
def test_every_scan_visits_every_cell_once_and_frame_by_frame(name, grid):
    order = scan_order(name, grid, key="scan")
    assert sorted(order.tolist()) == list(range(len(order)))
    if len(grid) == 3:
        frame = order // (grid[1] * grid[2])
        assert torch.equal(frame, frame.sort().values)


@pytest.mark.parametrize("name", ["alternate", "zigzag", "zigzag-down", "spiral-in"])
@pytest.mark.parametrize("grid", [(3, 5), (6, 4), (5, 5)])
def test_neighbours_in_these_scans_touch(name, grid):
    order = scan_order(name, grid, key="scan")
    places = torch.stack([order // grid[1], order % grid[1]], 1)
    assert (places[1:] - places[:-1]).abs().amax(1).max() == 1


def test_the_diagonal_order_is_the_zigzag():
    assert torch.equal(diagonal(grid=(4, 6)).order, scan_order("zigzag", (4, 6), key="scan"))
    assert torch.equal(diagonal(grid=(4, 6), first="down").order, scan_order("zigzag-down", (4, 6), key="scan"))


@pytest.mark.parametrize(("name", "grid", "message"), [("snake", (3, 3), "choose one of"), ("zigzag", (9,), "both")])
def test_bad_scans_are_refused(name, grid, message):
    with pytest.raises(UserError, match=message):
        scan_order(name, grid, key="schedule.scan")
