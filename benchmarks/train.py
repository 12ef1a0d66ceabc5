"""How fast a generator trains, against what the device could do.

    python -m benchmarks.train --size L --grid 16x16 --orders raster neighboring parallel-4 --batch 128

Random ids, bfloat16 autocast, AdamW, the network's own dropout, blocks compiled unless --eager. Utilisation counts the
products and the attention where the order lets it look (benchmarks/cost.py), forward and backward, against a matrix
product measured in the same run.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.cost import measure_ceilings, training_flops
from benchmarks.networks import ORDERS, SIZES, make_generator, make_plan
from vgen.errors import reported
from vgen.generators.transformer import Transformer
from vgen.losses.tokens import token_cross_entropy
from vgen.runtime import pick_device
from vgen.schedules.building import parse_grid
from vgen.schedules.plan import Plan

HEADER = (
    "| order | attention | batch | compiled | first step s | s/step | tokens/s | TFLOP/s | utilisation | GiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass
class Training:
    """A network in training on random ids.

    Attributes:
        generator: the network, float32 weights.
        plan: decode order.
        batch: samples per step.
        flex: FlexAttention instead of the dense mask.
        vocab_size: number of ids.
    """

    generator: Transformer
    plan: Plan
    batch: int
    flex: bool
    vocab_size: int

    def __post_init__(self) -> None:
        """Make inputs and the optimizer."""
        device = self.generator.device
        self.generator.train()
        self.ids = torch.randint(self.vocab_size, (self.batch, self.plan.num_tokens), device=device)
        self.labels = torch.randint(1000, (self.batch,), device=device)
        self.optimizer = torch.optim.AdamW(
            self.generator.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=device.type == "cuda"
        )

    def step(self) -> None:
        """One optimizer step."""
        with torch.autocast(self.generator.device.type, torch.bfloat16):
            logits = self.generator.logits(self.ids, self.labels, self.plan, flex=self.flex)
            loss = token_cross_entropy(logits, self.ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def seconds_per_call(work: Callable[[], None], device: torch.device, calls: int) -> float:
    """Mean time of a number of calls, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def line(training: Training, order: str, compiled: bool, first: float, seconds: float, peak_flops: float) -> str:
    """A measurement as a line of the table."""
    device = training.generator.device
    flops = training_flops(training.generator, training.plan, training.batch) / seconds
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    tokens = training.batch * training.plan.num_tokens / seconds
    attention = "flex" if training.flex else "causal" if training.plan.on(device).causal else "dense"
    return (
        f"| {order} | {attention} | {training.batch} | {'yes' if compiled else 'no'} | {first:.2f} | {seconds:.4f} "
        f"| {tokens:.0f} | {flops / 1e12:.1f} | {flops / peak_flops:.1%} | {peak:.1f} |"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="L")
    parser.add_argument("--grid", default="16x16")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["raster", "neighboring", "parallel-4"])
    parser.add_argument("--attention", nargs="+", choices=("dense", "flex"), default=["dense", "flex"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--eager", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every order and kind of attention that was asked for."""
    given = parse(arguments)
    with reported():
        device = pick_device(given.device)
        ceilings = measure_ceilings(device, torch.bfloat16)
        print(f"torch {torch.__version__}: product {ceilings.flops_per_s / 1e12:.2f} TFLOP/s\n{HEADER}", flush=True)
        for order in given.orders:
            plan = make_plan(order, parse_grid(given.grid))
            for attention in given.attention:
                if attention == "flex" and (device.type != "cuda" or plan.on(device).causal):
                    continue
                generator = make_generator(given.size, plan, device=device, dtype=torch.float32, vocab_size=given.vocab)
                if not given.eager:
                    generator.compile_blocks()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
                training = Training(generator, plan, given.batch, attention == "flex", given.vocab)
                first = seconds_per_call(training.step, device, 1)
                seconds_per_call(training.step, device, min(2, given.steps))
                seconds = seconds_per_call(training.step, device, given.steps)
                print(line(training, order, not given.eager, first, seconds, ceilings.flops_per_s), flush=True)
                del training, generator


if __name__ == "__main__":
    main()
