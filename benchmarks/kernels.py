"""The kernels of the fused decode path, each against the plain layers.

    python -m benchmarks.kernels --rows 2 8 16 32 64 512 1024 4096
    python -m benchmarks.kernels --rows 4 8 16 32 64 --sweep --choose tiles.json

Every step is run on the weights of many layers one after the other, recorded as a CUDA graph, so that the weights come
from the device's memory and launches cost what they cost in a decoding. ``us`` is the time per layer, ``TB/s`` counts
the weights alone, ``error`` is the largest difference from the same step in float32, as a share of the largest number.
``layer`` is a block without its attention, the last column without early launch. ``--sweep`` times other tiles too and
the vendor's library; the layer is then the one of the best of them. ``--choose`` writes the best as a table of tiles.
"""

import argparse
import copy
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cost import median_seconds
from benchmarks.networks import SIZES
from benchmarks.tiles import candidates, class_of, write_tiles
from vgen.errors import UserError, reported
from vgen.generators.block import Block, BlockShape
from vgen.layers import availability, early_launch, few_rows, fused, many_rows
from vgen.layers.attention import View
from vgen.layers.cache import KVCache
from vgen.layers.handoff import Handoff
from vgen.layers.mlp import SwiGLU, swiglu_width
from vgen.layers.norm import RMSNorm
from vgen.layers.tiles import FEW, Product, Tile, best_tile, use_tiles
from vgen.runtime import pick_device, pick_dtype

HEADER = "| rows | step | tile | us | TB/s | plain us | times faster | error | plain error |\n" + "|---" * 9 + "|"
CACHE_ROWS = 64
WRONG = 0.02  # error of half precision that is not rounding
WORKERS = 12  # processes that compile
TRIED = 6  # tiles of a product that are tried in a layer
ROUNDS = 2  # over the products of a layer, as the best tile of one depends on the others'


@dataclass
class Case:
    """Blocks of many layers and what a pass gives them.

    Attributes:
        blocks: the layers.
        matrices: as many of an output head, [V, dim].
        x: residual stream [B, 1, dim].
        hidden: inside the feed-forward layer, [B, 1, hidden].
        view: rotary rows, cache of one layer and cache rows.
        arrivals: where programs that share columns count, [layers, dim]; cleared in front of the first layer.
        ready: what the kernel in front of a norm of x leaves for it.
    """

    blocks: list[Block]
    matrices: list[Tensor]
    x: Tensor
    hidden: Tensor
    view: View
    arrivals: Tensor
    ready: Handoff

    @classmethod
    def make(cls, blocks: list[Block], matrices: list[Tensor], rows: int) -> "Case":
        """Random inputs for a number of rows."""
        attention, feed_forward = blocks[0].attention, blocks[0].feed_forward
        assert isinstance(feed_forward, SwiGLU)
        weight = attention.wqkv.weight
        dim, device, dtype = weight.shape[1], weight.device, weight.dtype
        angles = torch.rand(1, attention.head_dim // 2, device=device) * 6
        cache = KVCache(
            layers=1,
            batch=rows,
            heads=attention.kv_heads,
            rows=CACHE_ROWS,
            head_dim=attention.head_dim,
            device=device,
            dtype=dtype,
        )
        view = View(
            causal=False,
            mask=None,
            rope=torch.stack([angles.cos(), angles.sin()], -1),
            cache=cache,
            rows=torch.tensor([5], device=device),
            row_start=5,
            prefix=6,
        )
        x, hidden = (torch.randn(rows, 1, n, device=device).to(dtype) for n in (dim, feed_forward.w1.out_features))
        arrivals = torch.zeros(len(blocks), dim, dtype=torch.int32, device=device)
        return cls(blocks, matrices, x, hidden, view, arrivals, _hand_off(x, blocks[0]))

    def exact(self) -> "Case":
        """The first layer and its inputs in float32."""
        case = Case.make([copy.deepcopy(self.blocks[0]).float()], [self.matrices[0].float()], len(self.x))
        view = View(**{**vars(case.view), "rope": self.view.rope})
        x = self.x.float()
        return replace(case, x=x, hidden=self.hidden.float(), view=view, ready=_hand_off(x, case.blocks[0]))

    def matrix(self, block: Block) -> Tensor:
        """The output head that is read where this block is run."""
        return self.matrices[self.blocks.index(block)]


def _hand_off(x: Tensor, block: Block) -> Handoff:
    """What a product by 16 programs leaves for a norm of x; the scales of all norms are the same here."""
    scale = parts(block)[0].weight
    assert scale is not None
    squares = x.flatten(0, 1).float().square().unflatten(1, (16, -1)).sum(2).t()
    return Handoff(x, x * scale, squares.contiguous())


@dataclass(frozen=True)
class Step:
    """One step of a block.

    Attributes:
        name: for the table.
        weights: numbers in the weights it reads.
        plain: by the plain layers.
        ours: by the kernels; the tile is None for the vendor's library.
        product: its name in the table of tiles; None = it takes no tile.
    """

    name: str
    weights: int
    plain: Callable[[Case, Block], Tensor]
    ours: Callable[[Case, Block, Tile | None], Tensor]
    product: Product | None = None


def parts(block: Block) -> tuple[RMSNorm, RMSNorm, SwiGLU]:
    """Both norms and the feed-forward layer."""
    first, second, feed_forward = block.attention_norm, block.ffn_norm, block.feed_forward
    assert isinstance(first, RMSNorm)
    assert isinstance(second, RMSNorm)
    assert isinstance(feed_forward, SwiGLU)
    return first, second, feed_forward


def _plain_project(case: Case, block: Block) -> Tensor:
    assert case.view.cache is not None
    window = case.view.cache.window(0, 5, 1)
    query = block.before(case.x, case.view.rope, (), window)[0]
    return torch.cat([query, window[0], window[1]], 1) if len(case.blocks) == 1 else query


def _our_project(case: Case, block: Block, tile: Tile | None) -> Tensor:
    assert case.view.cache is not None
    assert case.view.rows is not None
    attention = block.attention
    query = case.x.new_empty(len(case.x), 1, attention.heads, attention.head_dim)
    targets = (query, *case.view.cache.buffer[0], case.view.rope, case.view.rows)
    norm, weight = parts(block)[0], attention.wqkv.weight
    if tile:
        few_rows.project_rows(case.x, norm, weight, *targets, tile, ready=case.ready)
    else:
        many_rows.rotate_many(F.linear(many_rows.norm_many(case.x, norm)[1], weight), *targets)
    if len(case.blocks) > 1:
        return query
    return torch.cat([query.transpose(1, 2), *case.view.cache.window(0, 5, 1)], 1)


def _plain_gate(case: Case, block: Block) -> Tensor:
    _, norm, feed_forward = parts(block)
    normal = norm(case.x)
    return F.silu(feed_forward.w1(normal)) * feed_forward.w3(normal)


def _our_gate(case: Case, block: Block, tile: Tile | None) -> Tensor:
    _, norm, feed_forward = parts(block)
    if tile:
        return few_rows.gate_rows(case.x, norm, feed_forward.merged(), tile, ready=case.ready)
    return many_rows.gate_many(F.linear(many_rows.norm_many(case.x, norm)[1], feed_forward.merged()))


def _our_read(case: Case, block: Block, tile: Tile | None) -> Tensor:
    weight = case.matrix(block)
    return few_rows.add_rows(case.x, weight, None, tile, dtype=torch.float32)[0] if tile else F.linear(case.x, weight)


def _our_sum(case: Case, block: Block, x: Tensor, weight: Tensor, tile: Tile | None) -> Tensor:
    if not tile:
        return many_rows.add_product(case.x, x, weight)
    if block is case.blocks[0] and tile.splits > 1:
        case.arrivals.zero_()
    return few_rows.add_rows(x, weight, case.x, tile, arrivals=case.arrivals[case.blocks.index(block)])[0]


def steps_of(case: Case) -> list[Step]:
    """The steps that a pass takes."""
    block, rows = case.blocks[0], len(case.x)
    feed_forward = parts(block)[2]
    project, out, first, second = (
        layer.weight.numel() for layer in (block.attention.wqkv, block.attention.wo, feed_forward.w1, feed_forward.w2)
    )
    steps = [
        Step("project", project, _plain_project, _our_project, "project"),
        Step(
            "add (wo)",
            out,
            lambda case, block: case.x + block.attention.wo(case.x),
            lambda case, block, tile: _our_sum(case, block, case.x, block.attention.wo.weight, tile),
            "wo",
        ),
        Step("gate", 2 * first, _plain_gate, _our_gate, "gate"),
        Step(
            "add (w2)",
            second,
            lambda case, block: case.x + parts(block)[2].w2(case.hidden),
            lambda case, block, tile: _our_sum(case, block, case.hidden, parts(block)[2].w2.weight, tile),
            "w2",
        ),
        Step(
            "read",
            case.matrices[0].numel(),
            lambda case, block: F.linear(case.x, case.matrix(block)),
            _our_read,
            "read",
        ),
    ]
    if rows <= FEW:
        return steps
    return [replace(step, product=None) for step in steps if step.product in ("project", "gate")]


def seconds_per_layer(case: Case, work: Callable[[Block], Tensor]) -> float:
    """Time of a step, run over all layers; as a CUDA graph on a GPU."""

    def run() -> None:
        for block in case.blocks:
            work(block)

    device = case.x.device
    if device.type == "cuda":
        run()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
        return median_seconds(graph.replay, device, repeats=9) / len(case.blocks)
    return median_seconds(run, device, repeats=1, warmup=0) / len(case.blocks)


def error(got: Tensor, exact: Tensor) -> float:
    """Largest difference as a share of the largest number."""
    return float((got.float() - exact).abs().max() / exact.abs().max())


def used_tile(step: Step, case: Case) -> Tile | None:
    """What the table in use has for a step."""
    if step.product is None:
        return None
    width = (case.hidden if step.product == "w2" else case.x).shape[-1]
    return best_tile(step.product, len(case.x), width)


def tiles_for(step: Step, case: Case, sweep: bool) -> list[Tile | None]:
    """The tile in use first; None = the vendor's library."""
    used = used_tile(step, case)
    if step.product is None or not sweep:
        return [used]
    others: list[Tile | None] = [None, *candidates(step.product, len(case.x))]
    return [used, *(tile for tile in others if tile != used)]


def lines_for(case: Case, sweep: bool, ranked: dict[Product, list[Tile | None]]) -> Iterator[str]:
    """Table lines of the steps of a pass; tiles that are right go to ``ranked``, the fastest first."""
    rows = len(case.x)
    one, exact = replace(case, blocks=case.blocks[:1], matrices=case.matrices[:1]), case.exact()
    size = case.x.element_size()
    for step in steps_of(case):
        best = step.plain(exact, exact.blocks[0])
        plain_error = error(step.plain(one, one.blocks[0]), best)
        plain = seconds_per_layer(case, lambda block, step=step: step.plain(case, block))
        times: list[tuple[float, Tile | None]] = []
        for number, tile in enumerate(tiles_for(step, case, sweep)):
            name = "vendor" if tile is None else _tile_name(tile)
            start = f"| {rows} | {step.name} | {'used: ' if number == 0 else ''}{name} |"
            try:
                off = error(step.ours(one, one.blocks[0], tile), best)
                ours = seconds_per_layer(case, lambda block, step=step, tile=tile: step.ours(case, block, tile))
            except Exception as failure:
                # A tile that does not fit the device is a result of the sweep, not its end.
                if not sweep or "out of resource" not in str(failure):
                    raise
                yield f"{start} does not fit |"
                continue
            # A tile that is wrong is no candidate, however fast.
            if off <= max(2 * plain_error, WRONG):
                times.append((ours, tile))
            yield (
                f"{start} {ours * 1e6:.2f} | {step.weights * size / ours / 1e12:.2f} | {plain * 1e6:.2f} "
                f"| {plain / ours:.2f} | {off:.1e} | {plain_error:.1e} |"
            )
        if step.product:
            ranked[step.product] = [tile for _, tile in sorted(times, key=lambda entry: entry[0])]


def _tile_name(tile: Tile) -> str:
    marks = (f" in {tile.parts}" if tile.parts > 1 else "") + (f" by {tile.splits}" if tile.splits > 1 else "")
    marks += "" if tile.early else " late"
    return f"{tile.kind}{marks} {tile.columns} x {tile.inner}, {tile.warps} warps, {tile.stages} stages"


def _chain(case: Case, step: Callable[[Block, Tensor], Tensor]) -> float:
    """Time per layer of a step whose results are the next one's inputs."""
    state = [case.x]

    def work(block: Block) -> Tensor:
        if block is case.blocks[0]:
            state[0] = case.x.clone()
        state[0] = step(block, state[0])
        return state[0]

    return seconds_per_layer(case, work)


def our_layer(case: Case) -> float:
    """Time of a block without its attention by the tiles in use."""

    def ours(block: Block, x: Tensor) -> Tensor:
        first, second, feed_forward = parts(block)
        query = fused.before(x, first, block.attention, case.view, 0)
        seen = query.transpose(1, 2).flatten(2)
        # The next block's norm has the same scale as the first one's.
        out, case.view.relay.last = fused.behind(
            x, seen, second, block.attention, feed_forward, following=parts(case.blocks[0])[0]
        )
        return out

    return _chain(case, ours)


def layer_line(case: Case, name: str = "") -> tuple[str, float, float]:
    """Table line of whole blocks without their attention, each fed by the one in front; times early and late."""

    def plain(block: Block, x: Tensor) -> Tensor:
        assert case.view.cache is not None
        query, _, _ = block.before(x, case.view.rope, (), case.view.cache.window(0, 5, 1))
        return block.behind(x, query.transpose(1, 2).flatten(2), ())

    slow, fast = _chain(case, plain), our_layer(case)
    with patch.object(early_launch, "_comes_early", lambda device: False):
        late = our_layer(case)
    weights = sum(p.numel() for p in case.blocks[0].parameters() if p.dim() == 2) * case.x.element_size()
    line = (
        f"| {len(case.x)} | layer | {name} | {fast * 1e6:.2f} | {weights / fast / 1e12:.2f} | {slow * 1e6:.2f} "
        f"| {slow / fast:.2f} | not launched early: | {late * 1e6:.2f} us |"
    )
    return line, fast, late


def swept_layer(
    case: Case, ranked: dict[Product, list[Tile | None]], chosen: dict[Product, Tile | None]
) -> Iterator[str]:
    """Lines of the layer by several tables; the fastest goes to ``chosen``.

    By the table in use, by the vendor's library and by the fastest steps. As neighbours share the device, the fastest
    steps need not make the fastest layer: every product is then tried with its next best tiles, one after the other.
    """
    rows = len(case.x)
    used = {step.product: used_tile(step, case) for step in steps_of(case) if step.product}
    steps = used | {product: tiles[0] for product, tiles in ranked.items()}
    fastest = math.inf
    try:
        for name, tiles in (("used", used), ("vendor", dict.fromkeys(used)), ("fastest steps", steps)):
            use_tiles({product: ((FEW, tile),) for product, tile in tiles.items()})
            line, early, late = layer_line(case, name)
            yield line
            for seconds, wanted in ((early, True), (late, False)):
                if seconds < fastest:
                    fastest = seconds
                    chosen.update({key: tile and replace(tile, early=wanted) for key, tile in tiles.items()})
        for product in [product for product in ranked if product != "read"] * ROUNDS:
            for tile in ranked[product][:TRIED]:
                changed = chosen | {product: tile}
                if changed == chosen:
                    continue
                use_tiles({name: ((FEW, other),) for name, other in changed.items()})
                seconds = our_layer(case)
                yield (
                    f"| {rows} | layer | with {product} {'vendor' if tile is None else _tile_name(tile)} "
                    f"| {seconds * 1e6:.2f} |"
                )
                if seconds < fastest:
                    fastest = seconds
                    chosen.update(changed)
        chosen["read"] = ranked["read"][0]
    finally:
        use_tiles(None)


@cache
def make_blocks(size: str, layers: int, device: torch.device, dtype: torch.dtype) -> list[Block]:
    """Blocks of random weights."""
    dim, _, heads = SIZES[size]
    shape = BlockShape(
        dim=dim,
        heads=heads,
        kv_heads=heads,
        ffn="swiglu",
        ffn_hidden=swiglu_width(dim),
        norm="rms",
        norm_eps=1e-5,
        norm_affine=True,
        norm_position="pre",
        bias=False,
        qkv_bias=None,
        qk_norm=None,
        modulated=False,
        attention_dropout=0.0,
        residual_dropout=0.0,
        ffn_dropout=0.0,
        ffn_inner_dropout=None,
    )
    with torch.inference_mode(False), torch.device(device):
        return [Block(shape, drop_path=0.0).to(dtype).eval().requires_grad_(False) for _ in range(layers)]


@cache
def make_matrices(size: str, layers: int, vocab: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Output heads of random weights."""
    dim = SIZES[size][0]
    return [torch.randn(vocab, dim, device=device, dtype=dtype) * dim**-0.5 for _ in range(layers)]


def make_case(given: argparse.Namespace, layers: int, rows: int) -> Case:
    """Random layers and inputs as a command line says."""
    where = pick_device(given.device), pick_dtype(given.dtype)
    matrices = make_matrices(given.size, layers, given.vocab, *where)
    return Case.make(make_blocks(given.size, layers, *where), matrices, rows)


@torch.inference_mode()
def _compile(given: argparse.Namespace, rows: int, step: int, tile: Tile) -> None:
    case = make_case(given, 1, rows)
    for each in {tile, replace(tile, early=False)}:
        # What does not compile is reported where it is timed.
        with suppress(Exception):
            steps_of(case)[step].ours(case, case.blocks[0], each)


def compile_ahead(given: argparse.Namespace) -> None:
    """Fill Triton's cache on disk with what a sweep times, many kernels at a time."""
    context = multiprocessing.get_context("spawn")
    with suppress(BrokenProcessPool), ProcessPoolExecutor(min(WORKERS, os.cpu_count() or 1), context) as pool:
        for rows in (rows for rows in given.rows if rows <= FEW):
            case = make_case(given, 1, rows)
            for number, step in enumerate(steps_of(case)):
                for tile in filter(None, tiles_for(step, case, sweep=True)):
                    pool.submit(_compile, given, rows, number, tile)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="L")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8, 16, 32, 64, 512, 1024, 4096])
    parser.add_argument("--vocab", type=int, default=16384, help="rows of an output head")
    parser.add_argument("--layers", type=int, default=48, help="weights that are read one after the other")
    parser.add_argument("--sweep", action="store_true", help="time other tiles and the vendor's library too")
    parser.add_argument("--choose", type=Path, metavar="PATH", help="write the best of a sweep as a table of tiles")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, a line as soon as it is known."""
    given = parse(arguments)
    with reported():
        if given.choose and not given.sweep:
            raise UserError("--choose writes the best of a sweep; add --sweep")
        device, dtype = pick_device(given.device), pick_dtype(given.dtype)
        availability.check_available(device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(f"{name}, torch {torch.__version__}, size {given.size}, {dtype}", flush=True)
        if given.sweep and device.type == "cuda":
            start = time.perf_counter()
            compile_ahead(given)
            print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
        print(HEADER, flush=True)
        table: dict[Product, list[tuple[int, Tile | None]]] = {}
        for rows in given.rows:
            case = make_case(given, given.layers, rows)
            ranked: dict[Product, list[Tile | None]] = {}
            for line in lines_for(case, given.sweep, ranked):
                print(line, flush=True)
            if not (given.sweep and ranked):
                print(layer_line(case)[0], flush=True)
                continue
            chosen: dict[Product, Tile | None] = {}
            for line in swept_layer(case, ranked, chosen):
                print(line, flush=True)
            for product, tile in chosen.items():
                table.setdefault(product, []).append((class_of(rows), tile))
            if given.choose:
                write_tiles(given.choose, table)


if __name__ == "__main__":
    main()
