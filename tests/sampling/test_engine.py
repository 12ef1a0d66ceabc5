import pytest
import torch

from tests.generators.helpers import tiny_generator
from vgen.errors import UserError
from vgen.sampling.decode import decode
from vgen.sampling.engine import Decoder
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.neighboring import neighboring
from vgen.schedules.parallel import parallel
from vgen.schedules.randar import randar
from vgen.schedules.raster import raster
from vgen.schedules.zipar import zipar

PLANS = {
    "raster": raster(grid=(4, 4)),
    "neighboring": neighboring(grid=(4, 4)),
    "parallel": parallel(grid=(4, 4), regions=4),
    "zipar": zipar(grid=(4, 4), window=2),
    "randar": randar(grid=(4, 4), steps=5),
}
LABELS = torch.tensor([0, 1, 2])


def rerun(run, device):
    """Stands in for a CUDA graph: the same function on the same buffers."""
    result = run()

    def replay():
        result.copy_(run())
        return result

    return replay


@pytest.mark.parametrize("name", PLANS)
def test_recorded_passes_give_the_tokens_of_the_plain_loop(name):
    plan = PLANS[name]
    generator = tiny_generator(plan)
    decoder = Decoder(generator, plan, engine="graph", record=rerun)
    for seed in range(4):
        sampling = Sampling(seed=seed, top_k=9, guidance=Guidance(scale=2.0, end=7))
        index, labels = torch.arange(3) + 10 * seed, LABELS.roll(seed)
        expected = decode(generator, plan, labels, sampling=sampling, sample_index=index)
        assert torch.equal(decoder(labels, sampling=sampling, sample_index=index), expected)


def test_a_result_outlives_the_next_batch():
    plan = PLANS["raster"]
    decoder = Decoder(tiny_generator(plan), plan, engine="graph", record=rerun)
    results = [decoder(LABELS, sampling=Sampling(seed=s), sample_index=torch.arange(3)) for s in range(4)]
    kept = results[2].clone()
    decoder(LABELS, sampling=Sampling(seed=9), sample_index=torch.arange(3))
    assert torch.equal(results[2], kept)


def test_each_kind_of_batch_is_recorded_at_its_second_appearance_and_the_oldest_is_dropped():
    plan = PLANS["neighboring"]
    generator, made = tiny_generator(plan), []

    def counting(run, device):
        made.append(run)
        return rerun(run, device)

    decoder = Decoder(generator, plan, engine="graph", record=counting, largest=2)
    counts = []
    for batch in (1, 1, 1, 2, 2, 3, 3, 1, 3):
        decoder(LABELS[:batch], sampling=Sampling(), sample_index=torch.arange(batch))
        counts.append(len(made))
    assert counts == [0, 1, 1, 1, 2, 2, 3, 4, 4]
    decoder(LABELS, sampling=Sampling(temperature=0.5), sample_index=torch.arange(3))
    assert len(made) == 4


def test_given_tokens_and_watchers():
    plan = PLANS["randar"]
    generator = tiny_generator(plan)
    decoder = Decoder(generator, plan, engine="graph", record=rerun)
    known = torch.zeros(3, 16, dtype=torch.bool)
    known[:, :4] = True
    given = torch.randint(23, (3, 16))
    for seed in range(3):
        shared = {"sampling": Sampling(seed=seed), "sample_index": torch.arange(3), "known_ids": given, "known": known}
        assert torch.equal(decoder(LABELS, **shared), decode(generator, plan, LABELS, **shared))
    seen = []
    decoder(LABELS, sampling=Sampling(), sample_index=torch.arange(3), watch=lambda step, ids: seen.append(step))
    assert seen == list(range(len(plan.forwards)))


def test_given_tokens_are_counted_for_a_recording_too():
    plan = randar(grid=(4, 4), steps=3, num_known=4)
    decoder = Decoder(tiny_generator(plan), plan, engine="graph", record=rerun)
    given = torch.randint(23, (3, 16))
    known = torch.zeros(3, 16, dtype=torch.bool)
    known[:, :4] = True
    shared = {"sampling": Sampling(), "sample_index": torch.arange(3), "known_ids": given}
    for _ in range(3):
        assert torch.equal(decoder(LABELS, known=known, **shared)[:, :4], given[:, :4])
    known[1, 3] = False
    with pytest.raises(UserError, match="expects 4 given tokens in every sample"):
        decoder(LABELS, known=known, **shared)


def test_run_time_orders_are_never_recorded():
    plan = zipar(grid=(4, 4), window=2, adaptive=True)
    decoder = Decoder(tiny_generator(plan), plan, engine="graph", record=rerun)
    assert not decoder.recorded


def test_a_recording_that_does_not_fit_is_done_without():
    plan, tries = PLANS["raster"], []
    generator = tiny_generator(plan)

    def full(run, device):
        tries.append(run)
        raise torch.OutOfMemoryError("out of memory")

    decoder = Decoder(generator, plan, engine="graph", record=full)
    for seed in range(4):
        shared = {"sampling": Sampling(seed=seed), "sample_index": torch.arange(3)}
        assert torch.equal(decoder(LABELS, **shared), decode(generator, plan, LABELS, **shared))
    assert len(tries) == 1


def test_engines_that_are_not_there():
    generator = tiny_generator(PLANS["raster"])
    with pytest.raises(UserError, match="engine=fast"):
        Decoder(generator, PLANS["raster"], engine="fast")
    with pytest.raises(UserError, match="CUDA graphs"):
        Decoder(generator, PLANS["raster"], engine="graph")
    with pytest.raises(UserError, match="engine=fused is not available"):
        Decoder(generator, PLANS["raster"], engine="fused")
    assert not Decoder(generator, PLANS["raster"]).recorded
