"""How fast tokens are decoded, against what the device could do.

    python -m benchmarks.decode --size L --grid 16x16 --orders raster neighboring parallel-4 --batch 1 64 256

    python -m benchmarks.decode --size L --grid 5x16x16 --vocab 8192 --classes 101 --batch 1 16 64 --engines graph

Random weights, tokens only (no tokenizer), the whole call timed after warm-up. ``warm`` is the first call, which
compiles what the engine compiles and runs eagerly; ``record`` the second, which records the graph. ``bound`` is the
share of the measured ceilings reached (see benchmarks/cost.py). With a grid of
three axes a row's "images" are clips. Every row is printed when it is known.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import get_args

import torch

from benchmarks.cost import Ceilings, decoding_cost, measure_ceilings, seconds_of
from benchmarks.networks import ORDERS, SIZES, make_generator, make_plan
from benchmarks.tiles import read_tiles
from vgen.errors import reported
from vgen.generators.conditioning import ClassCondition
from vgen.generators.transformer import Transformer
from vgen.layers.tiles import use_tiles
from vgen.runtime import pick_cache_dtype, pick_device, pick_dtype
from vgen.sampling.engine import Decoder, Engine
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.building import parse_grid
from vgen.schedules.plan import Plan

HEADER = (
    "| order | batch | engine | passes | warm s | record s | seconds | images/s | TB/s | TFLOP/s | bound s | of bound "
    "| GiB |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Row:
    """One measurement."""

    order: str
    batch: int
    engine: str
    passes: int
    warm_s: float
    record_s: float
    seconds: float
    images_per_s: float
    tb_per_s: float
    tflops: float
    bound_s: float
    share: float
    peak_gib: float

    def text(self) -> str:
        """As a line of the table."""
        return (
            f"| {self.order} | {self.batch} | {self.engine} | {self.passes} | {self.warm_s:.2f} | {self.record_s:.2f} "
            f"| {self.seconds:.4f} | {self.images_per_s:.1f} | {self.tb_per_s:.2f} | {self.tflops:.1f} "
            f"| {self.bound_s:.4f} | {self.share:.1%} | {self.peak_gib:.1f} |"
        )


def measure(
    generator: Transformer,
    plan: Plan,
    *,
    order: str,
    batch: int,
    engine: Engine,
    ceilings: Ceilings,
    sampling: Sampling,
    repeats: int = 3,
) -> Row:
    """Time one engine on one batch; fresh sample indices in every call."""
    device = generator.device
    decoder = Decoder(generator, plan, engine=engine)
    condition = generator.condition
    assert isinstance(condition, ClassCondition)
    labels = torch.arange(batch, device=device) % condition.num_classes
    calls = 0

    def work() -> None:
        nonlocal calls
        index = torch.arange(calls * batch, (calls + 1) * batch, device=device)
        decoder(labels, sampling=sampling, sample_index=index)
        calls += 1

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    warm = seconds_of(work, device)
    record = seconds_of(work, device) if decoder.recorded else 0.0
    median = sorted(seconds_of(work, device) for _ in range(repeats))[repeats // 2]
    cost = decoding_cost(generator, plan, batch, branches=2 if sampling.guidance.scale != 1.0 else 1)
    bound = cost.seconds(ceilings)
    peak = torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0
    return Row(
        order=order,
        batch=batch,
        engine=engine,
        passes=cost.forwards,
        warm_s=warm,
        record_s=record,
        seconds=median,
        images_per_s=batch / median,
        tb_per_s=cost.bytes / median / 1e12,
        tflops=cost.flops / median / 1e12,
        bound_s=bound,
        share=bound / median,
        peak_gib=peak,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="L")
    parser.add_argument("--grid", default="16x16", help="H x W, or T x H x W for clips")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["raster", "neighboring", "parallel-4"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--engines", nargs="+", choices=get_args(Engine), default=["eager", "graph", "fused"])
    parser.add_argument("--scale", type=float, default=2.0, help="guidance; 1 = one branch")
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache-dtype", help="of keys and values, as sample.py's cache_dtype")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiles", metavar="PATH", help="what benchmarks.kernels --choose wrote, for engine fused")
    parser.add_argument("--json", action="store_true", help="also print every row as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every order, engine and batch that was asked for."""
    given = parse(arguments)
    with reported():
        device, dtype = pick_device(given.device), pick_dtype(given.dtype)
        if given.tiles:
            use_tiles(read_tiles(given.tiles, SIZES[given.size][0]))
        ceilings = measure_ceilings(device, dtype)
        print(
            f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}: "
            f"copy {ceilings.bytes_per_s / 1e12:.3f} TB/s, product {ceilings.flops_per_s / 1e12:.2f} TFLOP/s"
        )
        print(HEADER, flush=True)
        for order in given.orders:
            plan = make_plan(order, parse_grid(given.grid))
            sizes = {"vocab_size": given.vocab, "num_classes": given.classes}
            generator = make_generator(given.size, plan, device=device, dtype=dtype, **sizes)
            generator.cache_dtype = pick_cache_dtype(given.cache_dtype)
            for engine in given.engines:
                for batch in given.batch:
                    try:
                        row = measure(
                            generator,
                            plan,
                            order=order,
                            batch=batch,
                            engine=engine,
                            ceilings=ceilings,
                            sampling=Sampling(guidance=Guidance(scale=given.scale)),
                            repeats=given.repeats,
                        )
                    except torch.OutOfMemoryError:
                        print(f"| {order} | {batch} | {engine} | out of memory |", flush=True)
                        break
                    print(row.text(), flush=True)
                    if given.json:
                        print(json.dumps(asdict(row)), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
