"""How fast pictures reach the disk: tokens, pixels, uint8 on the host, and files written in the background.

    python -m benchmarks.end_to_end --size L --batch 256 --samples 2048 --pixels bfloat16 --channels-last

Random weights; the tokenizer is LlamaGen's VQ-16; take a multiple of the batch as samples. Each part is timed alone
over a few batches (pixels until they are uint8 on the host), then the whole, as sample.py runs it. `in turn` is what
the parts give one after the other, computed from the two; `both` the share of the whole's time during which both were
under way on the device; the last column says how much of the slower part's speed the whole reaches. `--profile` prints
what the device spends its time on for the pixels of a batch.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.cost import seconds_of
from benchmarks.networks import ORDERS, SIZES, make_generator, make_plan
from vgen.errors import reported
from vgen.processes import Processes
from vgen.runtime import pick_device, pick_dtype
from vgen.sampling.engine import Engine
from vgen.sampling.job import run_sampling
from vgen.sampling.overlap import lanes_of
from vgen.sampling.pipeline import Pipeline
from vgen.sampling.pixels import DTYPES, PixelSettings
from vgen.sampling.settings import Guidance, Sampling
from vgen.tokenizers.vqgan import VQGAN

HEADER = (
    "| order | batch | engine | pixels | tokens, images/s | pixels, images/s | in turn, images/s | whole, images/s "
    "| both | of slower part |"
)
PART_BATCHES = 4
Span = tuple[float, float]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="L")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--channels", type=int, default=128, help="of the tokenizer at full resolution")
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["neighboring"])
    parser.add_argument("--engine", choices=get_args(Engine), default="auto")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--format", choices=("npz", "png", "both"), default="npz")
    parser.add_argument("--pixels", choices=DTYPES, default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--in-turn", action="store_true", help="pixels.beside_tokens=false")
    parser.add_argument(
        "--cudnn-benchmark", action="store_true", help="let cuDNN try its algorithms; sampling does not"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels of the pixel decoder by time")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every order that was asked for."""
    given = parse(arguments)
    with reported():
        device, dtype = pick_device(given.device), pick_dtype(given.dtype)
        tokenizer = VQGAN(
            image_size=given.image_size,
            base_channels=given.channels,
            encoder_multipliers=[1, 1, 2, 2, 4],
            decoder_multipliers=[1, 1, 2, 2, 4],
            codebook_size=given.vocab,
        )
        tokenizer.to(device).eval()
        torch.backends.cudnn.benchmark = given.cudnn_benchmark
        settings = PixelSettings(given.pixels, given.channels_last, given.compile, not given.in_turn)
        print(HEADER + "\n" + "|---" * (HEADER.count("|") - 1) + "|", flush=True)
        for order in given.orders:
            plan = make_plan(order, (tokenizer.grid[0], tokenizer.grid[1]))
            generator = make_generator(given.size, plan, device=device, dtype=dtype, vocab_size=given.vocab)
            pipeline = Pipeline(
                generator=generator, tokenizer=tokenizer, plan=plan, engine=given.engine, pixels=settings
            )
            print(measure(pipeline, given, order), flush=True)


def measure(pipeline: Pipeline, given: argparse.Namespace, order: str) -> str:
    """Time the parts and the whole; a line of the table."""
    sampling = Sampling(guidance=Guidance(scale=2.0))
    device, batch = pipeline.device, given.batch
    labels, index = torch.arange(batch) % 1000, torch.arange(batch)
    ids = torch.randint(pipeline.generator.vocab_size, (batch, pipeline.plan.num_tokens), device=device)

    @torch.inference_mode()
    def tokens() -> None:
        for _ in range(PART_BATCHES):
            pipeline.generate_ids(labels, index, sampling)

    @torch.inference_mode()
    def pixels() -> None:
        with lanes_of(device) as lanes:
            started = [lanes.start(lambda: ids, finish) for _ in range(PART_BATCHES)]
            for ready in started:
                ready()

    def finish(ids: Tensor) -> Tensor:
        return pipeline.finish(ids, labels, index, sampling)

    for _ in range(3):
        finish(pipeline.generate_ids(labels, index, sampling))
    pixels()
    tokens_s = seconds_of(tokens, device) / PART_BATCHES
    pixels_s = seconds_of(pixels, device) / PART_BATCHES
    if given.profile:
        print(profiled(lambda: finish(ids), device), file=sys.stderr, flush=True)
    run = partial(run_whole, pipeline, given, sampling)
    run(2 * batch)
    with timed(pipeline) as spans:
        whole_s = seconds_of(lambda: run(given.samples), device)
    rate, slower = given.samples / whole_s, batch / max(tokens_s, pixels_s)
    settings = f"{given.pixels}{', channels last' * given.channels_last}{', compiled' * given.compile}"
    settings += ", in turn" * given.in_turn
    return (
        f"| {order} | {batch} | {given.engine} | {settings} | {batch / tokens_s:.1f} | {batch / pixels_s:.1f} "
        f"| {batch / (tokens_s + pixels_s):.1f} | {rate:.1f} | {shared(*spans()) / whole_s:.0%} | {rate / slower:.1%} |"
    )


def run_whole(pipeline: Pipeline, given: argparse.Namespace, sampling: Sampling, samples: int) -> None:
    """Sample into files as sample.py does."""
    with tempfile.TemporaryDirectory() as folder:
        run_sampling(
            pipeline,
            sampling,
            peers=Processes(),
            identity={},
            out=str(Path(folder) / "samples"),
            num_samples=samples,
            labels="random",
            batch_size=given.batch,
            fmt=given.format,
            grid_pictures=0,
        )


@contextmanager
def timed(pipeline: Pipeline) -> Iterator[Callable[[], tuple[list[Span], list[Span]]]]:
    """While inside, note when tokens and pixels are under way; gives a function that returns the spans in seconds."""
    on_cuda = pipeline.device.type == "cuda"
    marks: dict[str, list[tuple[Any, Any]]] = {"generate_ids": [], "finish": []}

    def now() -> Any:
        if not on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(pipeline.device))
        return event

    origin = now()

    def noted(name: str) -> Callable[..., Tensor]:
        work = getattr(pipeline, name)

        def call(*arguments: Any) -> Tensor:
            start = now()
            result = work(*arguments)
            marks[name].append((start, now()))
            return result

        return call

    def since(mark: Any) -> float:
        return origin.elapsed_time(mark) / 1000 if on_cuda else mark - origin

    for name in marks:
        setattr(pipeline, name, noted(name))

    def spans() -> tuple[list[Span], list[Span]]:
        tokens, pixels = ([(since(a), since(b)) for a, b in pairs] for pairs in marks.values())
        return tokens, pixels

    try:
        yield spans
    finally:
        for name in marks:
            delattr(pipeline, name)


def shared(first: Sequence[Span], second: Sequence[Span]) -> float:
    """Seconds that lie in spans of both lists; spans of one list do not overlap."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in first for b in second)


def profiled(work: Callable[[], Any], device: torch.device) -> str:
    """What the device spends its time on, the dearest first."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        seconds_of(work, device)
    order = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=90)


if __name__ == "__main__":
    main()
