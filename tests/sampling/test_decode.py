import pytest
import torch

from tests.generators.helpers import tiny_generator
from vgen.sampling.decode import decode
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.neighboring import neighboring
from vgen.schedules.parallel import parallel
from vgen.schedules.randar import randar
from vgen.schedules.raster import raster
from vgen.schedules.zipar import zipar

PLAN = raster(grid=(3, 4))
LABELS = torch.tensor([0, 1, 2, 3])
INDEX = torch.tensor([10, 11, 12, 13])


def test_greedy_cached_decoding_equals_uncached_teacher_forcing():
    generator = tiny_generator(PLAN)
    ids = decode(generator, PLAN, LABELS, sampling=Sampling(greedy=True), sample_index=INDEX)
    with torch.inference_mode():
        assert torch.equal(generator.logits(ids, LABELS, PLAN).argmax(-1), ids)


def test_logits_of_half_precision_are_guided_in_float32(monkeypatch):
    generator = tiny_generator(PLAN).bfloat16()
    shared = {"sampling": Sampling(guidance=Guidance(scale=2.5)), "sample_index": INDEX}
    traced, again = [], []
    ids = decode(generator, PLAN, LABELS, trace=lambda _, logits: traced.append(logits), **shared)
    assert all(logits.dtype == torch.float32 for logits in traced)
    step = generator.step
    monkeypatch.setattr(generator, "step", lambda *given, **options: step(*given, **options).float())
    assert torch.equal(decode(generator, PLAN, LABELS, trace=lambda _, x: again.append(x), **shared), ids)
    assert all(map(torch.equal, traced, again))
    with torch.inference_mode():
        assert generator.logits(ids, LABELS, PLAN).dtype == torch.float32


def test_traced_guided_logits_equal_the_formula_on_teacher_forced_logits():
    generator = tiny_generator(PLAN)
    guidance = Guidance(scale=2.5, schedule="linear", start=1, end=9)
    traced = []
    ids = decode(
        generator,
        PLAN,
        LABELS,
        sampling=Sampling(guidance=guidance),
        sample_index=INDEX,
        trace=lambda _, logits: traced.append(logits),
    )
    with torch.inference_mode():
        conditional = generator.logits(ids, LABELS, PLAN)
        null = generator.logits(ids, torch.full_like(LABELS, 5), PLAN)
    for step, logits in enumerate(traced):
        weight = guidance.weight(step, 12)
        expected = null[:, step] + weight * (conditional[:, step] - null[:, step])
        torch.testing.assert_close(logits[:, 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "sampling", [Sampling(seed=3), Sampling(seed=3, top_k=5, top_p=0.9, guidance=Guidance(scale=2.0))]
)
def test_a_sample_does_not_depend_on_its_batch(sampling):
    generator = tiny_generator(PLAN)
    together = decode(generator, PLAN, LABELS, sampling=sampling, sample_index=INDEX)
    for i in range(4):
        alone = decode(generator, PLAN, LABELS[i : i + 1], sampling=sampling, sample_index=INDEX[i : i + 1])
        assert torch.equal(alone[0], together[i])


def test_seed_and_sample_index_change_the_sample():
    generator = tiny_generator(PLAN)
    labels = torch.zeros(4, dtype=torch.int64)
    base = decode(generator, PLAN, labels, sampling=Sampling(seed=0), sample_index=INDEX)
    assert len(base.unique(dim=0)) == 4
    assert not torch.equal(base, decode(generator, PLAN, labels, sampling=Sampling(seed=1), sample_index=INDEX))


def test_the_unguided_branch_is_not_computed_after_the_last_guided_pass():
    generator = tiny_generator(PLAN)
    batches = []
    step = generator.step

    def counting(ids, *arguments, **keywords):
        batches.append(len(ids))
        return step(ids, *arguments, **keywords)

    generator.step = counting
    guidance = Guidance(scale=2.0, end=3)
    decode(generator, PLAN, LABELS, sampling=Sampling(guidance=guidance), sample_index=INDEX)
    assert batches == [8, 8, 8] + [4] * 9
    batches.clear()
    decode(generator, PLAN, LABELS, sampling=Sampling(), sample_index=INDEX)
    assert batches == [4] * 12


def test_known_tokens_are_kept_and_condition_the_rest():
    generator = tiny_generator(PLAN)
    known = torch.zeros(4, 12, dtype=torch.bool)
    known[:, [0, 5]] = True
    given = torch.randint(23, (4, 12))
    sampling = Sampling(greedy=True)
    ids = decode(generator, PLAN, LABELS, sampling=sampling, sample_index=INDEX, known_ids=given, known=known)
    assert torch.equal(ids[known], given[known])
    with torch.inference_mode():
        best = generator.logits(ids, LABELS, PLAN).argmax(-1)
    assert torch.equal(best[~known], ids[~known])


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        neighboring(grid=(3, 4)),
        parallel(grid=(4, 4), regions=4),
        zipar(grid=(4, 6), window=2),
        randar(grid=(3, 4)),
    ],
    ids=lambda plan: plan.name,
)
def test_nothing_is_read_before_it_is_written(plan, monkeypatch):
    generator = tiny_generator(plan)
    shared = {"sampling": Sampling(guidance=Guidance(scale=2.0)), "sample_index": INDEX}
    expected = decode(generator, plan, LABELS, **shared)
    make = type(generator).new_cache

    def dirty(batch, rows):
        cache = make(generator, batch, rows)
        cache.buffer.fill_(float("nan"))
        return cache

    monkeypatch.setattr(generator, "new_cache", dirty)
    assert torch.equal(decode(generator, plan, LABELS, **shared), expected)
    assert plan.sees_unwritten == (plan.name == "zipar")


@pytest.mark.parametrize("plan", [PLAN, neighboring(grid=(3, 4)), randar(grid=(3, 4))], ids=lambda plan: plan.name)
def test_a_cache_of_one_byte_per_number_changes_logits_a_little(plan):
    generator = tiny_generator(plan)
    ids, condition = torch.randint(23, (2, 12)), generator.embed_condition(LABELS[:2])

    def logits():
        cache = generator.new_cache(2, plan.num_rows)
        if plan.sees_unwritten:
            cache.clear()
        return torch.cat([generator.step(ids, condition, each, plan.order, cache) for each in plan.forwards], 1)

    exact = logits()
    generator.cache_dtype = torch.float8_e4m3fn
    off = (logits() - exact).pow(2).mean().sqrt() / exact.std()
    assert 1e-4 < off < 0.15


def test_a_watcher_sees_what_is_open():
    generator, seen = tiny_generator(PLAN), []
    decode(generator, PLAN, LABELS, sampling=Sampling(), sample_index=INDEX, watch=lambda _, ids: seen.append(ids))
    assert [(ids >= 0).sum(1).unique().tolist() for ids in seen] == [[count] for count in range(1, 13)]


def test_stopping_early_leaves_the_rest_undecided():
    generator = tiny_generator(PLAN)
    whole = decode(generator, PLAN, LABELS, sampling=Sampling(), sample_index=INDEX)
    part = decode(generator, PLAN, LABELS, sampling=Sampling(), sample_index=INDEX, num_passes=5)
    assert torch.equal(part[:, :5], whole[:, :5])
    assert (part[:, 5:] == 0).all()


def test_samples_follow_the_distribution_of_the_network():
    generator = tiny_generator(PLAN, vocab_size=5)
    labels = torch.full((4000,), 2)
    ids = decode(generator, PLAN, labels, sampling=Sampling(), sample_index=torch.arange(4000), num_passes=1)
    with torch.inference_mode():
        expected = generator.logits(ids[:1], labels[:1], PLAN)[0, 0].softmax(-1)
    seen = torch.bincount(ids[:, 0], minlength=5) / 4000
    assert (seen - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5
