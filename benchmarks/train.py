"""How fast a generator trains, against what the device could do.

    python -m benchmarks.train --size L --grid 16x16 --orders raster neighboring parallel-4 --batch 128

Random ids, bfloat16 autocast, AdamW, the network's own dropout, blocks compiled unless --eager. A variant names the
dtype of the residual stream, whether the loss is fused with the last product or taken of all logits, and how many
blocks are compiled as one: --variants float32:logits:1 bfloat16:fused:4. Utilisation counts the
products and the attention where the order lets it look (benchmarks/cost.py), forward and backward, against a matrix
product measured in the same run. ``--cudnn`` has cuDNN compute the attention, causal or under a dense mask; training
does not choose it by itself.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cost import measure_ceilings, training_flops
from benchmarks.networks import ORDERS, SIZES, make_generator, make_plan
from vgen.errors import UserError, reported
from vgen.generators.transformer import Transformer
from vgen.losses.tokens import linear_cross_entropy, token_cross_entropy
from vgen.runtime import pick_device
from vgen.schedules.building import parse_grid
from vgen.schedules.plan import Plan

HEADER = (
    "| order | attention | residual | loss | group | batch | compiled | first step s | s/step | tokens/s | TFLOP/s "
    "| utilisation | GiB |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Variant:
    """How a step is computed.

    Attributes:
        residual: dtype of the residual stream.
        fused: the loss is fused with the last product.
        group: blocks compiled as one.
    """

    residual: torch.dtype
    fused: bool
    group: int

    @staticmethod
    def parse(text: str) -> "Variant":
        """Read ``residual:loss:group``.

        Raises:
            UserError: for another form.
        """
        residuals = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        residual, _, rest = text.partition(":")
        loss, _, group = rest.partition(":")
        if residual not in residuals or loss not in ("fused", "logits") or not group.isdigit():
            raise UserError(f"--variants {text} is not of the form float32|bfloat16:fused|logits:<blocks per group>")
        return Variant(residuals[residual], loss == "fused", int(group))

    def __str__(self) -> str:
        return f"{str(self.residual).removeprefix('torch.')} | {'fused' if self.fused else 'logits'} | {self.group}"


@dataclass
class Training:
    """A network in training on random ids.

    Attributes:
        generator: the network, float32 weights.
        plan: decode order.
        batch: samples per step.
        flex: FlexAttention instead of the dense mask.
        vocab_size: number of ids.
        variant: how a step is computed.
        compiled: blocks and the fused loss are compiled.
    """

    generator: Transformer
    plan: Plan
    batch: int
    flex: bool
    vocab_size: int
    variant: Variant
    compiled: bool

    def __post_init__(self) -> None:
        """Make inputs and the optimizer."""
        device = self.generator.device
        self.generator.train()
        self.generator.residual_dtype = None if self.variant.residual == torch.float32 else self.variant.residual
        if self.compiled:
            self.generator.compile_blocks(group=self.variant.group)
        self.ids = torch.randint(self.vocab_size, (self.batch, self.plan.num_tokens), device=device)
        self.labels = torch.randint(1000, (self.batch,), device=device)
        self.optimizer = torch.optim.AdamW(
            self.generator.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=device.type == "cuda"
        )

    def step(self) -> None:
        """One optimizer step."""
        with torch.autocast(self.generator.device.type, torch.bfloat16):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self) -> Tensor:
        """Mean cross entropy."""
        if not self.variant.fused:
            logits = self.generator.logits(self.ids, self.labels, self.plan, flex=self.flex)
            return token_cross_entropy(logits, self.ids)
        readout = self.generator.readout(self.ids, self.labels, self.plan, flex=self.flex)
        loss, _ = linear_cross_entropy(readout.features, readout.weight, readout.bias, self.ids, compiled=self.compiled)
        return loss


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


def line(training: Training, order: str, first: float, seconds: float, peak_flops: float) -> str:
    """A measurement as a line of the table."""
    device = training.generator.device
    flops = training_flops(training.generator, training.plan, training.batch) / seconds
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    tokens = training.batch * training.plan.num_tokens / seconds
    attention = "flex" if training.flex else "causal" if training.plan.on(device).causal else "dense"
    return (
        f"| {order} | {attention} | {training.variant} | {training.batch} | {'yes' if training.compiled else 'no'} "
        f"| {first:.2f} | {seconds:.4f} "
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
    parser.add_argument("--variants", nargs="+", default=["float32:fused:1", "bfloat16:fused:1"])
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--fused-rotation", action="store_true", help="task.fused_rotation=true")
    parser.add_argument("--cudnn", action="store_true", help="attention by cuDNN (GPU only)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every order and kind of attention that was asked for."""
    given = parse(arguments)
    with reported():
        device = pick_device(given.device)
        if given.cudnn and device.type != "cuda":
            raise UserError("--cudnn needs a GPU")
        ceilings = measure_ceilings(device, torch.bfloat16)
        print(f"torch {torch.__version__}: product {ceilings.flops_per_s / 1e12:.2f} TFLOP/s\n{HEADER}", flush=True)
        variants = [Variant.parse(text) for text in given.variants]
        for order, attention, variant in product(given.orders, given.attention, variants):
            plan = make_plan(order, parse_grid(given.grid))
            if attention == "flex" and (device.type != "cuda" or plan.on(device).causal):
                continue
            generator = make_generator(given.size, plan, device=device, dtype=torch.float32, vocab_size=given.vocab)
            if given.fused_rotation:
                generator.fuse_rotation()
            # Every measurement compiles anew: after a few compilations of one function the rest would run uncompiled.
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            training = Training(
                generator, plan, given.batch, attention == "flex", given.vocab, variant, not given.eager
            )
            # The kernel is chosen when a step is first compiled.
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if given.cudnn else nullcontext():
                first = seconds_per_call(training.step, device, 1)
                seconds_per_call(training.step, device, min(2, given.steps))
                seconds = seconds_per_call(training.step, device, given.steps)
            print(line(training, order, first, seconds, ceilings.flops_per_s), flush=True)
            del training, generator


if __name__ == "__main__":
    main()
