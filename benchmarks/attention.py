"""The attention and the draw of a decoding pass, beside PyTorch's.

    python -m benchmarks.attention --variants

Every time is that of one call in a CUDA graph of many, each on data of its own, so that no cache of the device holds
it; ``TB/s`` counts keys, values, queries and results (or logits) once. ``error`` is the largest difference from float32
attention. ``--variants`` adds other cuts into programs than :func:`vgen.layers.short_attention.pick_tile` takes.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from vgen.errors import reported
from vgen.layers.attention import additive_mask, attend
from vgen.layers.short_attention import Tile, pick_tile, runs_here, short_attention
from vgen.runtime import pick_device, pick_dtype
from vgen.sampling.decode import guide
from vgen.sampling.draw import draw_tokens, draws_here
from vgen.sampling.filters import filter_logits, pick_tokens

_COLD = 256 * 2**20  # bytes between two uses of the same data, several times the L2 cache


def seconds_per_call(call: Callable[[int], object], copies: int, device: torch.device, repeats: int = 5) -> float:
    """Time of one of ``copies`` calls, each with its number; on a GPU recorded together and replayed."""

    def run() -> None:
        for copy in range(copies):
            call(copy)

    if device.type != "cuda":
        call(0)
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) / copies
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(0)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repeats):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times) / copies


@dataclass(frozen=True)
class Case:
    """One attention call.

    Attributes:
        samples: B, both guidance branches counted.
        fed: F.
        prefix: P.
        masked: with an additive mask.
    """

    samples: int
    fed: int
    prefix: int
    masked: bool


class Data:
    """Queries and a cache of many layers, in one pool of random numbers.

    Args:
        case: the call.
        pool: flat tensor of random numbers.
        heads: query heads.
        kv_heads: key-value heads.
        width: of a head.
    """

    def __init__(self, case: Case, pool: Tensor, *, heads: int, kv_heads: int, width: int) -> None:
        samples, fed, prefix = case.samples, case.fed, case.prefix
        kept = 2 * samples * kv_heads * (prefix + 1) * width
        asked = samples * fed * heads * width
        self.bytes = (2 * samples * kv_heads * prefix * width + 2 * asked) * pool.element_size()
        wanted = max(4, -(-_COLD // self.bytes)) if pool.is_cuda else 1
        self.copies = max(1, min(64, len(pool) // (kept + asked), wanted))
        cache = pool[: self.copies * kept].view(self.copies, 2, samples, kv_heads, prefix + 1, width)[..., :prefix, :]
        self.keys, self.values = cache[:, 0], cache[:, 1]
        queries = pool[self.copies * kept :][: self.copies * asked].view(self.copies, samples, fed, heads, width)
        self.queries = queries.transpose(2, 3)
        self.bias = None
        if case.masked:
            visible = torch.rand(fed, prefix, device=pool.device) < 0.7
            visible[:, 0] = True
            self.bias = additive_mask(visible, pool.dtype)

    def plain(self, copy: int) -> Tensor:
        """PyTorch's attention, [B, F, heads * head_dim]."""
        out = attend(self.queries[copy], self.keys[copy], self.values[copy], causal=False, mask=self.bias, dropout=0.0)
        return out.transpose(1, 2).flatten(2)

    def short(self, copy: int, tile: Tile | None = None) -> Tensor:
        """The kernels of vgen."""
        return short_attention(self.queries[copy], self.keys[copy], self.values[copy], bias=self.bias, tile=tile)

    def error(self, out: Tensor) -> float:
        """Largest difference of the first copy's first samples from float32 attention."""
        query, key, value = (each[0, :4].float() for each in (self.queries, self.keys, self.values))
        bias = None if self.bias is None else self.bias.float()
        right = attend(query, key, value, causal=False, mask=bias, dropout=0.0).transpose(1, 2).flatten(2)
        return float((out[:4].float() - right).abs().max())


def variants(tile: Tile, prefix: int) -> Iterator[Tile]:
    """Other cuts near one."""
    if tile.early:
        yield replace(tile, early=False)
        if prefix > tile.rows:
            yield replace(tile, span=0 if tile.span else 1)
        if tile.rows == 128:
            yield replace(tile, warps=4)
            yield replace(tile, rows=64, warps=4, stages=5, span=2 * tile.span)
        return
    if prefix <= tile.rows:
        yield replace(tile, warps=1)
        yield replace(tile, stages=1)
        yield replace(tile, warps=4)
        if tile.shared > 1:
            yield replace(tile, shared=tile.shared // 2, warps=1)
            yield replace(tile, shared=1, warps=1)
        return
    yield replace(tile, warps=6 - tile.warps)
    yield replace(tile, stages=4)
    yield replace(tile, rows=128, warps=4)
    yield replace(tile, rows=32, stages=5, warps=2)


def measure_attention(given: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Print a row per call."""
    pool = torch.empty(given.pool_mib * 2**20 // torch.empty(0, dtype=dtype).element_size(), device=device, dtype=dtype)
    pool.normal_()
    print("| B | F | P | mask | kernel | us | TB/s | error |\n|---|---|---|---|---|---|---|---|", flush=True)

    def row(case: Case, name: str, call: Callable[[int], Tensor], data: Data) -> None:
        seconds = seconds_per_call(call, data.copies, device)
        mask = "yes" if case.masked else "no"
        print(
            f"| {case.samples} | {case.fed} | {case.prefix} | {mask} | {name} | {seconds * 1e6:.1f} "
            f"| {data.bytes / seconds / 1e12:.2f} | {data.error(call(0)):.1e} |",
            flush=True,
        )

    cases = [
        Case(samples, fed, prefix, masked)
        for samples in given.samples
        for fed in given.fed
        for prefix in given.prefix
        for masked in ((False, True) if fed > 1 and prefix == given.masked_prefix else (False,))
    ]
    for case in cases:
        data = Data(case, pool, heads=given.heads, kv_heads=given.kv_heads, width=given.width)
        row(case, "PyTorch", data.plain, data)
        if not runs_here(data.queries[0], data.keys[0], data.bias):
            continue
        tile = pick_tile(
            heads=given.heads,
            kv_heads=given.kv_heads,
            batch=case.samples,
            fed=case.fed,
            prefix=case.prefix,
            width=given.width,
            itemsize=pool.element_size(),
        )
        tiles = [tile]
        if given.variants and case.fed in given.varied_fed and not case.masked:
            tiles += list(variants(tile, case.prefix))
        for each in tiles:
            name = f"{'short' if each == tile else 'variant'}: rows {each.rows} x {each.shared}, "
            name += f"queries {each.queries}, {each.warps} warps, {each.stages} stages"
            name += (", split" if each.span else "") + (", early" if each.early else "")
            row(case, name, lambda copy, data=data, each=each: data.short(copy, each), data)


def measure_draw(given: argparse.Namespace, device: torch.device) -> None:
    """Print a row per draw of tokens from guided logits."""
    print("| B | D | logits | kernel | us | TB/s | same tokens |\n|---|---|---|---|---|---|---|", flush=True)
    for samples, decided in given.draws:
        for dtype in (torch.float32, torch.bfloat16):
            size = 2 * samples * decided * given.vocab * torch.empty(0, dtype=dtype).element_size()
            copies = max(2, min(64, _COLD // size)) if device.type == "cuda" else 1
            logits = 2 * torch.randn(copies, 2 * samples, decided, given.vocab, device=device, dtype=dtype)
            uniform = torch.rand(samples, decided + 1, device=device, dtype=torch.float64)
            targets = torch.arange(decided, device=device).expand(samples, -1)

            kernels = {"PyTorch": partial(_plain_draw, logits, uniform, targets)}
            if draws_here(logits):
                kernels["draw"] = partial(_fused_draw, logits, uniform, targets)
            for name, call in kernels.items():
                seconds = seconds_per_call(call, copies, device)
                same = float((call(0) == kernels["PyTorch"](0)).double().mean())
                print(
                    f"| {samples} | {decided} | {str(dtype).removeprefix('torch.')} | {name} | {seconds * 1e6:.1f} "
                    f"| {size / seconds / 1e12:.2f} | {same:.2%} |",
                    flush=True,
                )


def _plain_draw(logits: Tensor, uniform: Tensor, targets: Tensor, copy: int) -> Tensor:
    guided = filter_logits(guide(logits[copy].float(), 2, 2.0, 0.0))
    return pick_tokens(guided, uniform.gather(1, targets))


def _fused_draw(logits: Tensor, uniform: Tensor, targets: Tensor, copy: int) -> Tensor:
    return draw_tokens(logits[copy], uniform, targets, weight=2.0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""

    def pair(text: str) -> tuple[int, int]:
        samples, decided = text.split("x")
        return int(samples), int(decided)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 64, 512, 1024], help="both branches counted")
    parser.add_argument("--fed", type=int, nargs="+", default=[1, 4, 8, 16, 31])
    parser.add_argument("--prefix", type=int, nargs="+", default=[16, 64, 256, 576])
    parser.add_argument("--masked-prefix", type=int, default=256, help="also measured with a mask")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--draws", type=pair, nargs="*", default=[(1, 1), (256, 1), (256, 16)], metavar="BxD")
    parser.add_argument("--variants", action="store_true", help="also other cuts into programs")
    parser.add_argument("--varied-fed", type=int, nargs="*", default=[1, 31], help="F of the other cuts")
    parser.add_argument("--pool-mib", type=int, default=12 * 1024, help="random numbers the calls are cut from")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what was asked for."""
    given = parse(arguments)
    with reported():
        device = pick_device(given.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(f"{name}, torch {torch.__version__}", flush=True)
        measure_attention(given, device, pick_dtype(given.dtype))
        measure_draw(given, device)


if __name__ == "__main__":
    main()
