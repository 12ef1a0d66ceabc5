from dataclasses import replace

import pytest
import torch

from benchmarks.networks import make_generator, make_plan
from tests.checkpoints.helpers import tiny_release
from vgen.checkpoints.release import load_pipeline
from vgen.errors import UserError
from vgen.sampling import pipeline as pipeline_module
from vgen.sampling.overlap import InTurn, SideBySide, lanes_of, upload
from vgen.sampling.pipeline import Pipeline, sample_stream
from vgen.sampling.pixels import PixelSettings
from vgen.sampling.settings import Guidance, Sampling
from vgen.tokenizers.vqgan import VQGAN

COUNT = 11
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load_pipeline(tiny_release(tmp_path_factory.mktemp("release")), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def expected(pipeline):
    return pipeline.generate(torch.arange(COUNT) % 3, torch.arange(COUNT), Sampling())


class Ahead(InTurn):
    """Lanes as of a GPU, whose memory holds what was started until it is fetched, ``room`` samples at most."""

    ahead = 1

    def __init__(self, room=1000, part="tokens"):
        self.room, self.part = room, part
        self.running, self.most, self.waits, self.sizes = [], 0, 0, []

    def start(self, decode, finish):
        tokens = decode()
        count = len(tokens)
        self.sizes.append(count)
        if self.part == "tokens":
            self._take(count)
        samples = finish(tokens)
        if self.part == "pixels":
            self._take(count)
        self.running.append(count)
        self.most = max(self.most, len(self.running))

        def ready():
            self.running.pop(0)
            return samples

        return ready

    def _take(self, count):
        if sum(self.running) + count > self.room:
            raise torch.OutOfMemoryError("out of memory")

    def wait(self):
        self.waits += 1


def stream(pipeline, lanes, monkeypatch, **options):
    monkeypatch.setattr(pipeline_module, "lanes_of", lambda device, apart: lanes)
    return sample_stream(pipeline, torch.arange(COUNT) % 3, Sampling(), **{"batch_size": 3} | options)


def joined(batches):
    index = torch.cat([batch.index for batch in batches])
    assert index.tolist() == list(range(COUNT))
    return torch.cat([batch.images for batch in batches])


def test_samples_come_in_order_with_one_batch_ahead(pipeline, expected, monkeypatch):
    lanes, batches, running = Ahead(), [], []
    for batch in stream(pipeline, lanes, monkeypatch):
        batches.append(batch)
        running.append(len(lanes.running))
    assert torch.equal(joined(batches), expected)
    assert running == [1, 1, 1, 0]
    assert lanes.most == 2


@pytest.mark.parametrize("beside", [True, False])
def test_whether_pixels_have_a_stream_of_their_own_is_a_setting(pipeline, monkeypatch, beside):
    lanes, asked = Ahead(), []
    monkeypatch.setattr(pipeline_module, "lanes_of", lambda device, apart: asked.append(apart) or lanes)
    settings = replace(pipeline.pixel_decoder.settings, beside_tokens=beside)
    monkeypatch.setattr(pipeline.pixel_decoder, "settings", settings)
    list(sample_stream(pipeline, torch.arange(COUNT) % 3, Sampling(), batch_size=3))
    assert asked == [beside]


def test_the_cpu_takes_its_turns(pipeline, expected):
    assert type(lanes_of(torch.device("cpu"))) is InTurn
    batches = list(sample_stream(pipeline, torch.arange(COUNT) % 3, Sampling(), batch_size=4))
    assert torch.equal(joined(batches), expected)


@pytest.mark.parametrize("part", ["tokens", "pixels"])
def test_parts_that_do_not_fit_side_by_side_take_turns(pipeline, expected, monkeypatch, part):
    lanes = Ahead(room=5, part=part)
    assert torch.equal(joined(list(stream(pipeline, lanes, monkeypatch))), expected)
    assert lanes.sizes == [3, 3, 3, 3, 2]
    assert lanes.waits == 1


@pytest.mark.parametrize("part", ["tokens", "pixels"])
def test_batches_that_do_not_fit_alone_are_halved(pipeline, expected, monkeypatch, part):
    lanes = Ahead(room=4, part=part)
    options = {"batch_size": 8, "split_batches": True}
    assert torch.equal(joined(list(stream(pipeline, lanes, monkeypatch, **options))), expected)
    # Side by side failed after the halving, which tries it again.
    assert lanes.sizes == [8, 4, 4, 4, 3]
    with pytest.raises(UserError, match=r"batch_size=8 does not fit in memory, batch_size=4 does"):
        list(stream(pipeline, Ahead(room=4, part=part), monkeypatch, batch_size=8))
    with pytest.raises(UserError, match="a single sample"):
        list(stream(pipeline, Ahead(room=0, part=part), monkeypatch, batch_size=8))


def test_what_is_finished_outlives_the_failure_of_the_next_batch(pipeline, monkeypatch):
    generate_ids = pipeline.generate_ids

    def failing(labels, index, sampling):
        if 6 in index:
            raise UserError("clip 6 cannot be read")
        return generate_ids(labels, index, sampling)

    monkeypatch.setattr(pipeline, "generate_ids", failing)
    batches = []
    with pytest.raises(UserError, match="clip 6"):
        batches.extend(stream(pipeline, Ahead(), monkeypatch))
    assert [batch.index.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5]]


def test_a_stream_that_was_left_goes_on_where_it_was(pipeline, expected, monkeypatch):
    first = stream(pipeline, Ahead(), monkeypatch)
    batches = [next(first), next(first)]
    first.close()
    done = torch.zeros(COUNT, dtype=torch.bool)
    done[torch.cat([batch.index for batch in batches])] = True
    batches.extend(stream(pipeline, Ahead(), monkeypatch, done=done))
    assert torch.equal(joined(batches), expected)


def on_gpu(engine, order="neighboring", pixels=None):
    torch.manual_seed(0)
    device, plan = torch.device("cuda", 0), make_plan(order, (8, 8))
    multipliers = {"encoder_multipliers": [1, 1, 2], "decoder_multipliers": [1, 1, 2]}
    tokenizer = VQGAN(image_size=32, base_channels=64, codebook_size=256, **multipliers).to(device).eval()
    dtype = torch.bfloat16 if engine == "fused" else torch.float32
    generator = make_generator("tiny", plan, device=device, dtype=dtype, vocab_size=256)
    return Pipeline(generator=generator, tokenizer=tokenizer, plan=plan, engine=engine, pixels=pixels)


@gpu
@pytest.mark.parametrize("engine", ["eager", "graph", "fused"])
@pytest.mark.parametrize("order", ["raster", "neighboring"])
@pytest.mark.parametrize(
    "pixels",
    [
        PixelSettings(),
        PixelSettings("bfloat16", channels_last=True),
        PixelSettings("bfloat16", channels_last=True, beside_tokens=False),
    ],
    ids=["plain", "fast", "in turn"],
)
def test_overlapped_samples_are_the_plain_ones_on_a_gpu(monkeypatch, engine, order, pixels):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    labels, sampling = torch.arange(300) % 1000, Sampling(guidance=Guidance(scale=2.0), seed=4)
    plain, overlapped = on_gpu(engine, order, pixels), on_gpu(engine, order, pixels)
    batches = list(sample_stream(overlapped, labels, sampling, batch_size=64))
    assert torch.equal(torch.cat([batch.index for batch in batches]), torch.arange(300))
    for batch in batches:
        assert torch.equal(batch.images, plain.generate(batch.labels, batch.index, sampling).cpu())
    again = torch.cat([batch.images for batch in sample_stream(overlapped, labels, sampling, batch_size=64)])
    assert torch.equal(again, torch.cat([batch.images for batch in batches]))


@gpu
def test_results_outlive_the_buffers_of_a_gpu():
    lanes, device = SideBySide(torch.device("cuda", 0)), torch.device("cuda", 0)
    with lanes:
        results, waiting = [], []
        for number in range(20):
            size = (1 + number % 3, 1000, 1000)
            waiting.append(
                lanes.start(
                    lambda n=number, s=size: upload(torch.full(s, n, dtype=torch.uint8), device),
                    lambda tokens: tokens.double().sqrt().square().round().to(torch.uint8),
                )
            )
            if len(waiting) > 1:
                results.append(waiting.pop(0)())
        results.append(waiting.pop()())
    assert all(bool((result == number).all()) for number, result in enumerate(results))
    assert not any(result.is_pinned() for result in results)


@gpu
@pytest.mark.parametrize("split", [False, True])
def test_batches_too_large_for_a_gpu(split):
    pipeline = on_gpu("graph")
    torch.cuda.empty_cache()
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + 1.0 * 2**30) / total, device)
    try:
        labels = torch.zeros(3000, dtype=torch.int64)
        options = {"batch_size": 3000, "split_batches": split}
        if split:
            index = [batch.index for batch in sample_stream(pipeline, labels, Sampling(), **options)]
            assert torch.equal(torch.cat(index), torch.arange(3000))
            assert len(index) > 1
        else:
            with pytest.raises(UserError, match="batch_size=3000 does not fit in memory, batch_size="):
                list(sample_stream(pipeline, labels, Sampling(), **options))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
