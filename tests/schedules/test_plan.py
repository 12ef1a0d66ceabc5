"""Rendering of what the passes see, on a hand-made order."""

import pytest
import torch

from vgen.errors import UserError
from vgen.schedules.building import Step, make_plan, parse_grid
from vgen.schedules.raster import raster


def replan(steps, **options):
    """Raster slots on four tokens with other passes."""
    base = raster(grid=(4,))
    names = ("grid", "num_condition", "order", "kind", "source", "position", "target", "level_q", "level_k", "reads")
    fields = {name: getattr(base, name) for name in names}
    return make_plan(name="test", steps=steps, exact=False, **fields, **options)


def test_a_provisional_token_is_seen_only_by_its_own_slot_until_it_is_overwritten():
    plan = replan(
        [
            Step([0], [0]),
            Step([1, 2], [1, 2], sources=[0, 0]),
            Step([2, 3], [3]),
        ]
    )
    early, late = plan.forwards[1:]
    assert early.feed.tokens.tolist() == [0, 0]
    assert early.feed.position.tolist() == [0, 1]
    # Slot 1 holds its own token, slot 2 a stand-in: slot 2 sees itself, and in the next pass everything is true.
    assert early.mask.tolist() == [[True, True, False], [True, True, True]]
    assert late.mask.tolist() == [[True, True, True, False], [True, True, True, True]]


def test_an_unrefreshed_provisional_token_stays_hidden():
    plan = replan([Step([0], [0]), Step([1], [1]), Step([2], [2], sources=[0]), Step([3], [3])])
    assert plan.forwards[2].mask is None
    assert plan.forwards[3].mask.tolist() == [[True, True, False, True]]


def test_stated_visibility_replaces_the_derived_one():
    seen = torch.tensor([[True, True, True, False]])
    plan = replan([Step([0], [0]), Step([1], [1]), Step([2], [2], visible=seen), Step([3], [3])])
    assert plan.forwards[2].mask is None
    assert plan.forwards[2].prefix == 3
    unwritten = torch.tensor([[True, False, True, True]])
    plan = replan([Step([0], [0]), Step([1], [1], visible=unwritten), Step([2], [2]), Step([3], [3])])
    assert plan.forwards[1].prefix == 4
    assert torch.equal(plan.forwards[1].mask, unwritten)


@pytest.mark.parametrize(("text", "grid"), [("16", (16,)), ("4x6", (4, 6)), ("2X3x4", (2, 3, 4))])
def test_grids_are_parsed(text, grid):
    assert parse_grid(text) == grid


@pytest.mark.parametrize("text", ["", "4x", "0x3", "a", "-1x2"])
def test_bad_grids_are_refused(text):
    with pytest.raises(UserError, match="16x16"):
        parse_grid(text)
