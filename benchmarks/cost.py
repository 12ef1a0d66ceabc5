"""Bytes and floating-point operations that decoding and training must spend, and the ceilings of a device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vgen.generators.transformer import Transformer
from vgen.schedules.plan import Plan


@dataclass(frozen=True)
class Cost:
    """What a piece of work must move and compute at least.

    Attributes:
        weights: bytes of weights read.
        cache: bytes of keys and values read and written.
        flops: floating-point operations, a multiply-add as two.
        forwards: forward passes.
        layers: blocks run one after the other, over all passes.
    """

    weights: float
    cache: float
    flops: float
    forwards: int
    layers: int

    @property
    def bytes(self) -> float:
        """All bytes."""
        return self.weights + self.cache

    def seconds(self, ceilings: "Ceilings") -> float:
        """Least time: bytes and operations one after the other, or the dependent steps of the blocks if longer.

        A block cannot run in fewer than about five steps that each wait for the whole device (normalised projection,
        attention, its projection, two halves of the feed-forward layer), about 1.2 us each on an H200.
        """
        weights = self.weights / ceilings.bytes_per_s + self.layers * 5 * ceilings.step_s
        cache = self.cache / ceilings.bytes_per_s
        return max(weights, cache + self.flops / ceilings.flops_per_s)


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to do.

    Attributes:
        bytes_per_s: large copy, bytes read plus bytes written.
        flops_per_s: large matrix product in the working dtype.
        step_s: a step that waits for the whole device.
    """

    bytes_per_s: float
    flops_per_s: float
    step_s: float = 1.2e-6


def linear_weights(generator: Transformer) -> tuple[int, int]:
    """Numbers in the matrices of the blocks, and in those of all output heads."""
    blocks = sum(p.numel() for name, p in generator.layers.named_parameters() if p.dim() == 2)
    return blocks, sum(p.numel() for name, p in generator.outputs.named_parameters() if p.dim() == 2)


def decoding_cost(generator: Transformer, plan: Plan, batch: int, *, branches: int = 2) -> Cost:
    """Cost of decoding a batch by a static plan.

    Counted: every block's matrices once per pass, every output head's once per pass that reads it; keys and values of
    the visible prefix once per pass, those of the fed slots written once; products with the weights, and of the
    attention over the visible prefix. Not counted: activations, logits, embeddings.

    Args:
        generator: the network.
        plan: a plan without a policy.
        batch: samples.
        branches: guidance branches computed in every pass.
    """
    block_weights, head_weights = linear_weights(generator)
    per_head = head_weights / generator.num_readouts
    size = torch.finfo(generator.dtype).bits // 8
    depth, attention_width = len(generator.layers), generator.heads * generator.head_dim
    row = 2 * depth * generator.kv_heads * generator.head_dim * (generator.cache_dtype or generator.dtype).itemsize
    weights = cache = flops = 0.0
    rows = batch * branches
    for forward in plan.forwards:
        fed = forward.rows.shape[-1]
        reads = [len(slots) for slots in forward.read.slots]
        weights += (block_weights + per_head * sum(count > 0 for count in reads)) * size
        cache += rows * row * (forward.prefix + fed)
        flops += 2.0 * rows * (fed * block_weights + sum(reads) * per_head)
        flops += 4.0 * rows * depth * attention_width * fed * forward.prefix
    return Cost(weights, cache, flops, len(plan.forwards), len(plan.forwards) * depth)


def training_flops(generator: Transformer, plan: Plan, batch: int) -> float:
    """Operations of a training step: forward and backward (twice the forward), attention where visible only.

    Args:
        generator: the network.
        plan: decode order.
        batch: samples.
    """
    block_weights, head_weights = linear_weights(generator)
    visible = int(plan.visible().sum())
    products = plan.num_slots * block_weights + len(plan.reads) * head_weights / generator.num_readouts
    attention = 2 * len(generator.layers) * generator.heads * generator.head_dim * visible
    return 3.0 * 2.0 * batch * (products + attention)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the rate of a large copy and of a large matrix product on random data."""
    on_gpu = device.type == "cuda"
    size, side = (2**32, 8192) if on_gpu else (2**22, 256)
    return Ceilings(_copy_rate(size, device), _product_rate(side, device, dtype))


def _copy_rate(size: int, device: torch.device) -> float:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device, repeats=7)


def _product_rate(side: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: a @ b, device, repeats=15)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def median_seconds(work: Callable[[], Any], device: torch.device, *, repeats: int, warmup: int = 2) -> float:
    """Median time of a call, by device events on a GPU."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]
