import pytest
import torch

from tests.schedules.helpers import same_plan
from vgen.errors import UserError
from vgen.schedules.check import check_plan
from vgen.schedules.parallel import parallel
from vgen.schedules.plan import Kind
from vgen.schedules.raster import raster


@pytest.mark.parametrize(
    ("grid", "regions", "passes"),
    [
        ((24, 24), 4, 147),
        ((24, 24), 16, 51),
        ((16, 16), 16, 31),
        ((5, 16, 16), 4, 323),
        ((5, 16, 16), 16, 95),
        ((4, 6), [2, 3], 9),
        ((4, 6), [1, 3], 10),
    ],
)
def test_numbers_of_passes(grid, regions, passes):
    plan = parallel(grid=grid, regions=regions)
    assert len(plan.forwards) == passes
    assert sum(len(forward.slots) for forward in plan.forwards) == plan.num_tokens


@pytest.mark.parametrize(
    ("grid", "regions"), [((4, 6), [2, 3]), ((6, 4), [3, 1]), ((3, 9), 9), ((2, 4, 6), [2, 3]), ((2, 2, 2), 4)]
)
def test_the_contract_holds_for_other_cuts(grid, regions):
    for num_condition in (1, 4):
        check_plan(parallel(grid=grid, regions=regions, num_condition=num_condition))


def test_slots_of_the_smallest_example():
    plan = parallel(grid=(4, 4), regions=4, num_condition=1)
    assert plan.order.tolist() == [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]
    learned = plan.kind == Kind.LEARNED
    assert learned.nonzero().flatten().tolist() == [5, 6, 7]
    assert plan.source[learned].tolist() == [0, 1, 2]
    assert plan.position[:9].tolist() == [-1, 0, 1, 2, 3, -1, -1, -1, 4]
    assert plan.visible().sum(1).tolist() == [1, 2, 3, 4] + [8] * 4 + [12] * 4 + [16] * 4
    assert plan.num_slots == 16


def test_more_condition_slots_shift_everything():
    one, three = (parallel(grid=(4, 4), num_condition=count) for count in (1, 3))
    assert three.num_slots == one.num_slots + 2
    assert torch.equal(three.visible()[2:, 2:], one.visible())
    assert three.visible()[2:, :2].all()
    assert torch.equal(three.kind[3:], one.kind[1:])
    assert [f.targets.tolist() for f in three.forwards] == [f.targets.tolist() for f in one.forwards]


def test_tokens_of_a_pass_lie_in_different_regions():
    plan = parallel(grid=(2, 6, 4), regions=[3, 2])
    for forward in plan.forwards[6:]:
        frame, row, column = torch.unravel_index(plan.order[forward.targets], plan.grid)
        assert len(set(frame.tolist())) == 1
        assert len(set((row // 2 * 2 + column // 2).tolist())) == 6


def test_one_region_and_one_token_per_region_are_raster():
    expected = raster(grid=(3, 4), num_condition=2)
    assert same_plan(parallel(grid=(3, 4), num_condition=2, regions=1), expected)
    assert same_plan(parallel(grid=(3, 4), num_condition=2, regions=[3, 4]), expected)


@pytest.mark.parametrize(
    ("grid", "regions", "message"),
    [
        ((16,), 4, "height and width"),
        ((4, 6), 16, "does not divide"),
        ((5, 5), 4, "does not divide"),
        ((4, 4), 8, "square"),
        ((4, 4), 0, "square"),
        ((4, 4), [2], "rows, columns"),
        ((4, 4), [0, 2], "rows, columns"),
    ],
)
def test_bad_input(grid, regions, message):
    with pytest.raises(UserError, match=message):
        parallel(grid=grid, regions=regions)
