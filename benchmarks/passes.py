"""All blocks of a decoding pass in one launch, against a launch per step.

    python -m benchmarks.passes --rows 2 4 8 16 32
    python -m benchmarks.passes --rows 2 8 --sweep

Two samples with half of the rows each ask a filled cache; passes are recorded as CUDA graphs. ``us`` is the time of a
pass, ``error`` the largest difference between the two ways, as a share of the largest number. ``--sweep`` times other
cuts too: first some whole ones, then the best of them with one product cut otherwise at a time.
"""

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.cost import median_seconds
from benchmarks.kernels import make_blocks
from benchmarks.networks import SIZES
from vgen.errors import reported
from vgen.generators.block import Block
from vgen.layers import fused
from vgen.layers.attention import View
from vgen.layers.cache import KVCache
from vgen.layers.persistent import Cut, PersistentBlocks, cuts_in_use, use_cuts
from vgen.layers.tiles import Product, Tile
from vgen.runtime import pick_device, pick_dtype

HEADER = "| rows | blocks | us | of a launch per step | error |\n" + "|---" * 5 + "|"
CACHE_ROWS = 640
PASSES = 4  # recorded one after the other
WORKERS = 14  # processes that compile
NAMES: tuple[Product, ...] = ("project", "wo", "gate", "w2")


def _by_row(*columns: int, inner: tuple[int, int] = (512, 1024)) -> dict[Product, Tile]:
    kinds = zip(NAMES, columns, (inner[0], inner[1]) * 2, strict=True)
    return {name: Tile("by_row", count, length, 4) for name, count, length in kinds}


def _held(*tiles: tuple[int, int, int]) -> dict[Product, Tile]:
    return {name: Tile("held", c, i, 4, 1, parts=p) for name, (c, i, p) in zip(NAMES, tiles, strict=True)}


def whole_cuts(rows: int) -> list[Cut]:
    """Cuts to begin a sweep with; made for size L."""
    found = []
    if rows <= 4:
        found += [Cut(_by_row(16, 4, 16, 4), 4, 2, keys, 2) for keys in (64, 128)]
        found += [Cut(_by_row(32, 8, 32, 8), 8, 1), Cut(_by_row(16, 4, 16, 4, inner=(256, 512)), 4, 2)]
        found += [Cut(_by_row(8, 4, 8, 4, inner=(512, 512)), 4, 3, 64, 2), Cut(_by_row(32, 8, 16, 8), 4, 1)]
    if rows > 2:
        two = _held((16, 256, 4), (8, 128, 8), (16, 256, 2), (8, 128, 8))
        one = _held((32, 256, 2), (8, 128, 8), (32, 256, 1), (8, 128, 8))
        wide = _held((32, 256, 4), (16, 128, 8), (32, 256, 2), (16, 128, 8))
        short = _held((32, 128, 2), (8, 128, 8), (32, 128, 1), (8, 128, 8))
        found += [Cut(two, 4, 2), Cut(two, 4, 2, 64, 2), Cut(one, 8, 1), Cut(wide, 8, 1), Cut(short, 8, 1)]
        found += [Cut(short, 4, 1), Cut(two, 8, 1)]
    return found


def single_tiles(product: Product, kind: str, rows: int) -> list[Tile]:
    """Other tiles of a product."""
    if kind == "by_row":
        inner = 512 if product in ("project", "gate") else 1024
        return [Tile("by_row", columns, inner, 4) for columns in (2, 4, 8, 16, 32)]
    inner, lines = (128 if rows > 16 else 256), (2 if product == "gate" else 1)
    cuts = [(c, p) for c in (8, 16, 32) for p in (1, 2, 4, 8) if 64 <= c * p * lines <= 128]
    return [Tile("held", c, inner // 2 if p == 8 else inner, 4, 1, parts=p) for c, p in cuts]


@dataclass
class Case:
    """Blocks, a stream and what it sees."""

    blocks: list[Block]
    persistent: PersistentBlocks
    x: Tensor
    view: View

    @classmethod
    def make(cls, blocks: list[Block], rows: int, prefix: int) -> "Case":
        """Random numbers for two samples of half the rows; one row is one sample."""
        attention, batch = blocks[0].attention, min(rows, 2)
        fed, weight = rows // batch, attention.wqkv.weight
        for block in blocks:
            block.fuse(True)
        plain = [parts for block in blocks if (parts := block.plain()) is not None]
        cache = KVCache(
            layers=len(blocks),
            batch=batch,
            heads=attention.kv_heads,
            rows=CACHE_ROWS,
            head_dim=attention.head_dim,
            device=weight.device,
            dtype=weight.dtype,
        )
        cache.buffer.normal_()
        angles = torch.rand(fed, attention.head_dim // 2, device=weight.device) * 6
        view = View(
            causal=False,
            mask=None,
            rope=torch.stack([angles.cos(), angles.sin()], -1),
            cache=cache,
            rows=torch.arange(prefix - fed, prefix, device=weight.device),
            row_start=prefix - fed,
            prefix=prefix,
            settled=prefix - fed,
        )
        x = torch.randn(batch, fed, weight.shape[1], device=weight.device).to(weight.dtype)
        return cls(blocks, PersistentBlocks(plain), x, view)

    def by_steps(self) -> Tensor:
        """A launch per step."""
        x = self.x
        for index, block in enumerate(self.blocks):
            x = block(x, self.view, index)
        return x

    def at_once(self) -> Tensor | None:
        """One launch; None if the device does not hold the cut in use."""
        states = self.persistent.run(self.x, self.view, 1)
        return None if states is None else states[0]

    def seconds(self, work) -> float:
        """Time of a pass."""
        device = self.x.device
        if device.type != "cuda":
            return median_seconds(work, device, repeats=1, warmup=0)
        work()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(PASSES):
                work()
        return median_seconds(graph.replay, device, repeats=15) / PASSES


def describe(cut: Cut) -> str:
    """A cut in one line."""
    tiles = [f"{n} {t.columns}x{t.inner}{f' in {t.parts}' if t.parts > 1 else ''}" for n, t in cut.tiles.items()]
    kind = cut.tiles["project"].kind
    return f"{kind}, {cut.programs} x {cut.warps} warps, {', '.join(tiles)}, keys {cut.held} x {cut.keys}"


def measure(case: Case, cut: Cut, steps: float, expected: Tensor) -> tuple[str, float]:
    """Table line of a cut, and its time; infinite for one that does not fit or is wrong."""
    rows, before = case.x.shape[0] * case.x.shape[1], cuts_in_use()
    use_cuts(((rows, (cut,)),))
    try:
        got = case.at_once()
        if got is None:
            return f"| {rows} | {describe(cut)} | does not fit |", math.inf
        off = float((got - expected).abs().max() / expected.abs().max())
        seconds = case.seconds(case.at_once)
    finally:
        use_cuts(before)
    line = f"| {rows} | {describe(cut)} | {seconds * 1e6:.1f} | {seconds / steps:.2f} | {off:.1e} |"
    return line, seconds if off < 0.1 else math.inf


@torch.inference_mode()
def _compile(size: str, device: torch.device, dtype: torch.dtype, rows: int, prefix: int, cut: Cut) -> None:
    use_cuts(((rows, (cut,)),))
    # What does not compile is reported where it is timed.
    with suppress(Exception):
        Case.make(make_blocks(size, 1, device, dtype), rows, prefix).at_once()


def compile_ahead(size: str, device: torch.device, dtype: torch.dtype, cuts: Sequence[tuple[int, int, Cut]]) -> None:
    """Fill Triton's cache on disk, many kernels at a time."""
    context = multiprocessing.get_context("spawn")
    with suppress(BrokenProcessPool), ProcessPoolExecutor(min(WORKERS, os.cpu_count() or 1), context) as pool:
        for rows, prefix, cut in cuts:
            pool.submit(_compile, size, device, dtype, rows, prefix, cut)


def changes(cut: Cut, rows: int) -> Iterator[tuple[str, Cut]]:
    """The cut with one thing changed at a time, and what it is."""
    kind = cut.tiles["project"].kind
    for name in NAMES:
        for tile in single_tiles(name, kind, rows):
            if tile != cut.tiles[name]:
                yield name, replace(cut, tiles={**cut.tiles, name: tile})
    for keys, held in ((64, 2), (64, 3), (64, 4), (128, 1), (128, 2)):
        if (keys, held) != (cut.keys, cut.held):
            yield "keys", replace(cut, keys=keys, held=held)


def sweep(case: Case, limit_s: float = 1e9) -> Iterator[tuple[str, Cut | None]]:
    """Table lines; with each the best cut so far."""
    rows, prefix = case.x.shape[0] * case.x.shape[1], case.view.prefix
    weight, size = case.blocks[0].attention.wqkv.weight, _size(case)
    expected, steps, end = case.by_steps(), case.seconds(case.by_steps), time.perf_counter() + limit_s
    yield f"| {rows} | a launch per step | {steps * 1e6:.1f} | 1.00 | |", None
    best, fastest = None, math.inf
    cuts = [("whole", cut) for cut in whole_cuts(rows)]
    for _ in range(2):
        if weight.is_cuda:
            compile_ahead(size, weight.device, weight.dtype, [(rows, prefix, cut) for _, cut in cuts])
        gains: dict[str, tuple[float, Cut]] = {}
        for what, cut in cuts:
            line, seconds = measure(case, cut, steps, expected)
            if seconds < gains.get(what, (fastest, cut))[0]:
                gains[what] = seconds, cut
            yield line, best
            if time.perf_counter() > end:
                break
        if gains:
            fastest, best = min(gains.values(), key=lambda gain: gain[0])
        if best is None or time.perf_counter() > end:
            break
        cuts = list(changes(best, rows))
    if best is None:
        return
    # What made the pass faster by itself, together.
    tiles = {name: gains[name][1].tiles[name] if name in gains else best.tiles[name] for name in NAMES}
    last = gains["keys"][1] if "keys" in gains else best
    together = replace(best, tiles=tiles, keys=last.keys, held=last.held)
    line, seconds = measure(case, together, steps, expected)
    yield line, together if seconds < fastest else best


def _size(case: Case) -> str:
    width = case.x.shape[-1]
    return next(name for name, (dim, _, _) in SIZES.items() if dim == width)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="L")
    parser.add_argument("--layers", type=int, help="number of blocks; default: those of the size")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--prefix", type=int, default=160, help="visible cache rows")
    parser.add_argument("--sweep", action="store_true", help="time other cuts too")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, a line as soon as it is known."""
    given = parse(arguments)
    with reported():
        device, dtype = pick_device(given.device), pick_dtype(given.dtype)
        fused.check_available(device)
        print(f"{given.size}, torch {torch.__version__}, {dtype}", flush=True)
        print(HEADER, flush=True)
        blocks = make_blocks(given.size, given.layers or SIZES[given.size][1], device, dtype)
        for rows in given.rows:
            case = Case.make(blocks, rows, given.prefix)
            if given.sweep:
                found = []
                for line, best in sweep(case):
                    print(line, flush=True)
                    found.append(best)
                print(f"best for {rows} rows: {found[-1]}", flush=True)
                continue
            expected, steps = case.by_steps(), case.seconds(case.by_steps)
            print(f"| {rows} | a launch per step | {steps * 1e6:.1f} | 1.00 | |", flush=True)
            for cut in next((cuts for most, cuts in cuts_in_use() if rows <= most), ()):
                print(measure(case, cut, steps, expected)[0], flush=True)


if __name__ == "__main__":
    main()
