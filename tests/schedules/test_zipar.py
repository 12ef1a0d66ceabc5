import itertools

import pytest
import torch

from tests.generators.helpers import tiny_generator
from tests.schedules.helpers import same_plan
from vgen.errors import UserError
from vgen.sampling.decode import decode
from vgen.sampling.settings import Sampling
from vgen.schedules.check import check_plan
from vgen.schedules.plan import Kind
from vgen.schedules.raster import raster
from vgen.schedules.zipar import zipar

SHAPES = [(4, 4), (3, 5), (6, 8), (5, 3), (3, 2)]


@pytest.mark.parametrize(
    ("side", "window", "passes"), [(16, 2, 60), (16, 14, 228), (24, 12, 312), (24, 20, 488), (32, 8, 304)]
)
def test_published_numbers_of_passes(side, window, passes):
    assert len(zipar(grid=(side, side), window=window).forwards) == passes


@pytest.mark.parametrize(("grid", "cache", "overlap"), itertools.product(SHAPES, ("strict", "original"), (False, True)))
def test_every_window(grid, cache, overlap):
    height, width = grid
    for window in range(1, width):
        plan = zipar(grid=grid, window=window, cache=cache, overlap_first_row=overlap, num_condition=2)
        check_plan(plan)
        assert not plan.exact
        first = width if not overlap else window
        step = plan.step_of().view(grid)
        starts = torch.tensor([0] + [first + row * window for row in range(height - 1)])
        assert torch.equal(step, starts[:, None] + torch.arange(width))
        assert len(plan.forwards) == (width + (height - 1) * window if overlap else 2 * width + (height - 2) * window)


def test_the_worked_example():
    plan = zipar(grid=(4, 4), window=2)
    fed = [forward.feed.tokens.tolist() for forward in plan.forwards]
    positions = [forward.feed.position.tolist() for forward in plan.forwards]
    decided = [forward.targets.tolist() for forward in plan.forwards]
    assert decided == [[0], [1], [2], [3], [4], [5], [6, 8], [7, 9], [10, 12], [11, 13], [14], [15]]
    assert positions[6:] == [[5, 7], [6, 8], [7, 9, 11], [10, 12], [11, 13], [14]]
    # Token 3 stands in for 7 at the start of row 2, token 7 for 11 at the start of row 3.
    assert fed[6:] == [[5, 3], [6, 8], [7, 9, 7], [10, 12], [11, 13], [14]]


def test_strict_slots_see_themselves_and_known_tokens_only():
    for grid, overlap in itertools.product(SHAPES, (False, True)):
        for window in range(1, grid[1]):
            plan = zipar(grid=grid, window=window, overlap_first_row=overlap)
            true = torch.zeros(plan.num_rows, dtype=torch.bool)
            for forward in plan.forwards:
                is_token = plan.kind[forward.slots] == Kind.TOKEN
                own = torch.ones_like(is_token)
                own[is_token] = forward.feed.tokens == plan.source[forward.slots][is_token]
                true[forward.rows] = own
                seen = torch.ones(len(forward.rows), forward.prefix, dtype=torch.bool)
                seen = seen if forward.mask is None else forward.mask
                earlier = torch.arange(forward.prefix) < forward.rows[:, None]
                itself = torch.arange(forward.prefix) == forward.rows[:, None]
                assert torch.equal(seen, (earlier & true[: forward.prefix]) | itself)


def test_original_slots_see_every_row_up_to_their_own():
    plan = zipar(grid=(4, 5), window=2, cache="original")
    for forward in plan.forwards[1:]:
        assert forward.prefix == int(forward.rows.max()) + 1
        expected = torch.arange(forward.prefix) <= forward.rows[:, None]
        assert bool(expected.all()) if forward.mask is None else torch.equal(forward.mask, expected)


@pytest.mark.parametrize("cache", ["strict", "original"])
@pytest.mark.parametrize(
    ("grid", "window", "overlap"),
    [((4, 4), 4, False), ((4, 4), 9, True), ((1, 5), 2, True), ((2, 5), 2, False), ((5, 1), 1, True)],
)
def test_a_window_that_spans_the_row_is_raster(cache, grid, window, overlap):
    plan = zipar(grid=grid, window=window, cache=cache, overlap_first_row=overlap)
    assert same_plan(plan, raster(grid=grid))


def test_a_raster_model_decodes_it_and_the_first_rows_agree():
    generator = tiny_generator(raster(grid=(4, 6)))
    labels, index = torch.tensor([1, 2]), torch.arange(2)
    tokens = {
        name: decode(generator, plan, labels, sampling=Sampling(seed=4), sample_index=index).view(2, 4, 6)
        for name, plan in {
            "raster": raster(grid=(4, 6)),
            "strict": zipar(grid=(4, 6), window=2),
            "original": zipar(grid=(4, 6), window=2, cache="original"),
        }.items()
    }
    for name in ("strict", "original"):
        assert torch.equal(tokens[name][:, :2], tokens["raster"][:, :2])
        assert not torch.equal(tokens[name], tokens["raster"])
    assert not torch.equal(tokens["strict"], tokens["original"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (16,)}, "is not"),
        ({"grid": (2, 2, 4, 4)}, "is not"),
        ({"grid": (2, 4, 4), "window": 2, "adaptive": True}, "adaptive knows no frames"),
        ({"grid": (4, 4), "window": 0}, "window=0"),
        ({"grid": (4, 4), "cache": "lenient"}, "cache=lenient"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        zipar(**options)


@pytest.mark.parametrize("cache", ["strict", "original"])
def test_frames_are_decoded_one_after_the_other(cache):
    plan, picture = (zipar(grid=grid, window=2, cache=cache) for grid in ((3, 3, 4), (3, 4)))
    check_plan(plan)
    passes = len(picture.forwards)
    assert len(plan.forwards) == 3 * passes == 3 * (2 * 4 + (3 - 2) * 2)
    expected = torch.cat([picture.step_of() + frame * passes for frame in range(3)])
    assert torch.equal(plan.step_of(), expected)
    # The first pass of a frame feeds the true last token of the frame before; every row was fed its true tokens.
    assert plan.forwards[passes].feed.tokens.tolist() == [11]
    assert plan.forwards[passes].feed.position.tolist() == [11]
    # Inside a frame the stand-ins are those of a picture.
    for number, forward in enumerate(picture.forwards[1:], 1):
        assert plan.forwards[passes + number].feed.tokens.tolist() == [12 + t for t in forward.feed.tokens.tolist()]


def test_the_first_frame_is_decoded_like_a_picture():
    clip = raster(grid=(2, 3, 4))
    generator = tiny_generator(clip)
    labels, index = torch.tensor([1, 2]), torch.arange(2)
    tokens = [
        decode(generator, plan, labels, sampling=Sampling(seed=4), sample_index=index)
        for plan in (clip, zipar(grid=(2, 3, 4), window=2))
    ]
    assert torch.equal(tokens[0][:, :8], tokens[1][:, :8])
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("grid", [(4, 5), (2, 2, 5), (2, 5, 2)])
@pytest.mark.parametrize("cache", ["strict", "original"])
def test_logits_depend_only_on_tokens_of_earlier_passes(cache, grid):
    plan = zipar(grid=grid, window=min(2, grid[-1] - 1), cache=cache)
    generator = tiny_generator(plan)
    ids = torch.randint(23, (1, 20)).repeat(21, 1)
    each = torch.arange(20)
    ids[each, each] = (ids[each, each] + 1) % 23
    logits = torch.zeros(21, 20, 23)

    def trace(index, guided):
        logits[:, plan.forwards[index].targets] = guided

    decode(
        generator,
        plan,
        torch.zeros(21, dtype=torch.int64),
        sampling=Sampling(greedy=True),
        sample_index=torch.arange(21),
        known_ids=ids,
        known=torch.ones_like(ids, dtype=torch.bool),
        trace=trace,
    )
    changed = (logits[:-1] - logits[-1]).abs().amax(-1) > 1e-5
    step = plan.step_of()
    assert not (changed & (step[None, :] <= step[:, None])).any()
    assert changed[:-1].any(1).all()


def published_passes(height, width, window):
    """The published decoder's bookkeeping (running rows, stand-ins, re-feeding), as (positions, tokens, decided)."""
    known = [0] * height
    passes = [([], [], [0])] + [([column], [column], [column + 1]) for column in range(width - 1)]
    known[0], running, stand_in, completed = width, [1], {1: width - 1}, []
    while running:
        fed = [(row * width + width - 1,) * 2 for row in completed]
        for row in running:
            place = row * width + known[row] - 1
            fed.append((place, place if known[row] else stand_in[row]))
        decided, completed = [], []
        for row in list(running):
            decided.append(row * width + known[row])
            known[row] += 1
            if known[row] == window and row < height - 1 and row + 1 not in running:
                running.append(row + 1)
                stand_in[row + 1] = (row - 1) * width + known[row - 1] - 1
            if known[row] == width:
                running.remove(row)
                completed.append(row)
        passes.append(([place for place, _ in fed], [token for _, token in fed], decided))
    return passes


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (5, 3), (6, 8), (9, 4)])
def test_feeding_follows_the_published_decoder(grid):
    for window in range(2, grid[1]):
        plan = zipar(grid=grid, window=window, cache="original")
        ours = [(f.feed.position[f.feed.position >= 0], f.feed.tokens, f.targets) for f in plan.forwards]
        assert [tuple(part.tolist() for part in one) for one in ours] == published_passes(*grid, window)
