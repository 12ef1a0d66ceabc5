import pytest
import torch

from tests.schedules.helpers import random_grids, same_plan
from vgen.errors import UserError
from vgen.schedules.neighboring import neighboring
from vgen.schedules.raster import raster


@pytest.mark.parametrize(("grid", "passes"), [((16, 16), 31), ((32, 32), 63), ((4, 16, 16), 34), ((3, 5), 7)])
def test_published_numbers_of_passes(grid, passes):
    assert len(neighboring(grid=grid).forwards) == passes


def test_a_pass_decides_one_distance_in_raster_order():
    for grid in random_grids(10):
        plan = neighboring(grid=grid, num_condition=2)
        coordinates = torch.stack(torch.unravel_index(torch.arange(plan.num_tokens), grid))
        assert torch.equal(plan.step_of(), coordinates.sum(0))
        for forward in plan.forwards:
            decided = plan.order[forward.targets]
            assert torch.equal(decided, decided.sort().values)


def test_heads_read_the_neighbours_that_exist():
    plan = neighboring(grid=(2, 3), num_condition=2)
    # Raster 0 1 2 / 3 4 5 in decode order: 0 | 1 3 | 2 4 | 5; slots follow the two condition slots.
    assert plan.order.tolist() == [0, 1, 3, 2, 4, 5]
    right, below = 0, 1
    assert {tuple(read) for read in plan.reads.tolist()} == {
        (1, right, 0),
        (1, below, 0),
        (2, right, 1),
        (2, below, 2),
        (3, right, 3),
        (3, below, 4),
        (4, right, 4),
        (5, below, 5),
        (6, right, 5),
    }
    assert plan.target.tolist() == [-1, 0, 1, 3, 4, 5, 5]


def test_three_axes_have_three_heads_last_axis_first():
    plan = neighboring(grid=(2, 2, 2))
    assert plan.num_heads == 3
    heads = {int(plan.order[target]): [] for target in plan.reads[:, 2].tolist()}
    for _, head, target in plan.reads.tolist():
        heads[int(plan.order[target])].append(head)
    assert {position: sorted(found) for position, found in heads.items()} == {
        0: [0, 1, 2],
        1: [0],
        2: [1],
        3: [0, 1],
        4: [2],
        5: [0, 2],
        6: [1, 2],
        7: [0, 1, 2],
    }


def test_one_axis_is_raster():
    assert same_plan(neighboring(grid=(9,), num_condition=3), raster(grid=(9,), num_condition=3))


@pytest.mark.parametrize(("grid", "num_condition"), [((), 1), ((4, 0), 1), ((4, 4), 0)])
def test_bad_input(grid, num_condition):
    with pytest.raises(UserError):
        neighboring(grid=grid, num_condition=num_condition)
