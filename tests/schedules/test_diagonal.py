import pytest
import torch

from tests.schedules.helpers import same_plan
from vgen.errors import UserError
from vgen.schedules.diagonal import diagonal
from vgen.schedules.raster import raster


@pytest.mark.parametrize(
    ("grid", "scan"),
    [
        ((3, 3), [0, 1, 3, 6, 4, 2, 5, 7, 8]),
        ((3, 5), [0, 1, 5, 10, 6, 2, 3, 7, 11, 12, 8, 4, 9, 13, 14]),
        ((2, 2, 2), [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_worked_examples(grid, scan):
    assert diagonal(grid=grid).order.tolist() == scan


@pytest.mark.parametrize("grid", [(3, 3), (4, 7), (7, 4), (16, 16)])
@pytest.mark.parametrize("first", ["right", "down"])
def test_consecutive_tokens_touch(grid, first):
    row, column = torch.unravel_index(diagonal(grid=grid, first=first).order, grid)
    assert (torch.maximum(row.diff().abs(), column.diff().abs()) == 1).all()
    assert ((row[1], column[1]) == (0, 1)) == (first == "right")


@pytest.mark.parametrize("grid", [(3, 3), (4, 7), (7, 4)])
def test_down_first_is_the_transpose(grid):
    row, column = torch.unravel_index(diagonal(grid=grid[::-1]).order, grid[::-1])
    assert torch.equal(diagonal(grid=grid, first="down").order, column * grid[1] + row)


@pytest.mark.parametrize("grid", [(1, 7), (7, 1), (1, 1)])
def test_a_single_line_is_raster(grid):
    assert same_plan(diagonal(grid=grid, num_condition=2), raster(grid=grid, num_condition=2))


def test_a_slot_stands_at_its_token_and_looks_at_the_next():
    plan = diagonal(grid=(3, 4), num_condition=2)
    assert plan.position.tolist() == [-1, -1, *range(11)]
    assert plan.target.tolist() == [-1, *range(12)]


@pytest.mark.parametrize(("options", "message"), [({"grid": (9,)}, "height"), ({"grid": (3, 3), "first": "up"}, "up")])
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        diagonal(**options)
