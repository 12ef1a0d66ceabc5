"""Adaptive row starts of ZipAR."""

import pytest
import torch

from tests.generators.helpers import tiny_generator
from vgen.errors import UserError
from vgen.random import keyed_uniform
from vgen.sampling.decode import decode
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.adaptive import AdaptiveCourse, AdaptiveRows
from vgen.schedules.raster import raster
from vgen.schedules.zipar import zipar

VOCAB = 23


def uniform_of(batch):
    index = torch.arange(batch)[:, None]
    return lambda position, trial, stream: keyed_uniform(7, index, position, trial, stream)


def run_course(rows, batch, distribution, uniform=None):
    """Walk a course whose trial lanes get ``distribution(test number, exact)`` and whose other tokens are 0.

    Returns the tokens, the passes, and per row the pass that decided its first token.
    """
    plan = raster(grid=(rows.height, rows.width))
    course = AdaptiveCourse(rows, plan.forwards[0], batch, uniform or uniform_of(batch))
    ids = torch.zeros(batch, rows.height * rows.width + 1, dtype=torch.int64)
    passes, starts = 0, torch.full((batch, rows.height), -1)
    vocab = len(distribution(0, False))
    while (forward := course.next()) is not None:
        targets = forward.targets.expand(batch, -1)
        probabilities = torch.zeros(*targets.shape, vocab, dtype=torch.float64)
        probabilities[..., 0] = 1.0
        drawn = torch.zeros_like(targets)
        if passes:
            lane_tests = (course._tests + 1)[:, None].expand_as(targets)
            for number in lane_tests.unique().tolist():
                for exact in (False, True):
                    here = course._trial & (lane_tests == number) & (course._exact == exact)
                    probabilities[here] = distribution(number, exact)
            fresh = keyed_uniform(9, torch.arange(batch)[:, None], targets)
            drawn = torch.searchsorted(probabilities.cumsum(-1), fresh[..., None], right=True)[..., 0]
        tokens = course.settle(drawn, probabilities)
        ids.scatter_(1, targets, tokens)
        begun = (course._known > 0) & (starts < 0)
        starts[begun] = passes
        passes += 1
    return ids[:, :-1].view(batch, rows.height, rows.width), passes, starts


def test_a_distribution_that_never_changes_is_never_rejected():
    steady = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    for height, width, window in [(3, 4, 1), (5, 6, 2), (4, 7, 5)]:
        rows = AdaptiveRows(height, width, window, 1, False)
        _, passes, starts = run_course(rows, 50, lambda number, exact: steady)
        assert passes == 2 * width + (height - 2) * (window + 1)
        assert (starts[:, 2:] - starts[:, 1:-1] == window + 1).all()
        assert passes == len(zipar(grid=(height, width), window=window, adaptive=True).forwards)


def test_row_starts_follow_the_corrected_distribution():
    """Frequencies against the closed form of the accept and replace rule, on three rows of four tokens."""
    p = torch.tensor(
        [[0.5, 0.3, 0.1, 0.1], [0.2, 0.5, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.1, 0.4]], dtype=torch.float64
    )
    batch = 40_000
    rows = AdaptiveRows(3, 4, 1, 1, False)
    ids, _, starts = run_course(rows, batch, lambda number, exact: p[3] if exact else p[min(number, 2)])

    first = torch.minimum(p[0], p[1])
    replaced = (p[1] - p[0]).clamp(min=0) / (p[1] - p[0]).clamp(min=0).sum()
    second = torch.minimum(replaced, p[2])
    rejected, again = 1 - first.sum(), 1 - second.sum()
    expected = first + rejected * (second + again * p[3])
    assert expected.sum().item() == pytest.approx(1.0)
    counts = torch.bincount(ids[:, 2, 0], minlength=4).double()
    chi_square = ((counts - batch * expected) ** 2 / (batch * expected)).sum()
    assert chi_square < 16.3, "a correct rule exceeds this once in a thousand seeds"  # 3 degrees of freedom
    # What a rule without the correction would give is far away.
    assert ((counts - batch * p[0]) ** 2 / (batch * p[0])).sum() > 1000

    windows = torch.bincount(starts[:, 2] - starts[:, 1], minlength=5).double() / batch
    shares = torch.stack([first.sum(), rejected * second.sum(), rejected * again])
    torch.testing.assert_close(windows[2:5], shares, atol=0.01, rtol=0.0)


def test_accepted_rows_see_what_a_fixed_window_sees(monkeypatch):
    """With every candidate accepted, the last logits of every token are those of the window one larger."""
    grid, window = (4, 6), 2
    generator = tiny_generator(raster(grid=grid), vocab_size=VOCAB)
    labels, ids = torch.tensor([0, 1, 2]), torch.randint(VOCAB, (3, 24))
    known = torch.ones_like(ids, dtype=torch.bool)
    monkeypatch.setattr(AdaptiveCourse, "_draw", lambda self, target, stream: torch.zeros(len(target)))
    courses = []
    begin = AdaptiveRows.start
    monkeypatch.setattr(AdaptiveRows, "start", lambda *args: courses.append(begin(*args)) or courses[-1])

    def traced(plan, targets_of):
        logits = torch.zeros(3, 25, VOCAB)

        def trace(index, guided):
            targets = targets_of(index)
            logits.scatter_(1, targets[:, :, None].expand_as(guided), guided)

        sampling = Sampling(guidance=Guidance(scale=1.5, end=17))
        decode(
            generator,
            plan,
            labels,
            sampling=sampling,
            sample_index=torch.arange(3),
            known_ids=ids,
            known=known,
            trace=trace,
        )
        return logits[:, :24]

    fixed = zipar(grid=grid, window=window + 1)
    adaptive = zipar(grid=grid, window=window, adaptive=True)
    want = traced(fixed, lambda index: fixed.forwards[index].targets.expand(3, -1))
    first = torch.zeros(3, 1, dtype=torch.int64)
    got = traced(adaptive, lambda index: courses[-1]._targets if index else first)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
def test_samples_keep_row_states_of_their_own(overlap):
    plan = zipar(grid=(5, 6), window=2, adaptive=True, overlap_first_row=overlap)
    generator = tiny_generator(raster(grid=(5, 6)), vocab_size=VOCAB)
    labels, index = torch.arange(5), torch.arange(5)
    sampling = Sampling(seed=3, temperature=0.7, guidance=Guidance(scale=2.0, schedule="linear"))
    together = decode(generator, plan, labels, sampling=sampling, sample_index=index)
    alone = torch.cat(
        [decode(generator, plan, labels[i : i + 1], sampling=sampling, sample_index=index[i : i + 1]) for i in range(5)]
    )
    assert torch.equal(together, alone)


def test_more_context_never_makes_the_greedy_decode_wrong_where_the_window_is_the_row():
    trained = raster(grid=(3, 4))
    generator = tiny_generator(trained, vocab_size=VOCAB)
    labels, options = torch.tensor([0, 4]), {"sampling": Sampling(greedy=True), "sample_index": torch.arange(2)}
    plan = zipar(grid=(3, 4), window=4, adaptive=True)
    assert torch.equal(decode(generator, plan, labels, **options), decode(generator, trained, labels, **options))


def test_the_originals_cache_has_no_adaptive_window():
    with pytest.raises(UserError, match="cache=strict"):
        zipar(grid=(4, 4), window=2, adaptive=True, cache="original")
