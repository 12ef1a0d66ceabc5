"""The kernels of the fused decode path, each against the plain layers.

    python -m benchmarks.kernels --rows 2 8 16 32 64 512 1024 4096
    python -m benchmarks.kernels --rows 2 8 32 64 --sweep

Every step is run on the weights of many layers one after the other, recorded as a CUDA graph, so that the weights come
from the device's memory and launches cost what they cost in a decoding. ``us`` is the time per layer, ``TB/s`` counts
the weights alone, ``error`` is the largest difference from the same step in float32, as a share of the largest number.
``layer`` is a block without its attention, the last column without early launch. ``--sweep`` times other tiles too.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cost import median_seconds
from benchmarks.networks import SIZES
from vgen.errors import reported
from vgen.generators.block import Block, BlockShape
from vgen.layers import fused
from vgen.layers.attention import View
from vgen.layers.cache import KVCache
from vgen.layers.mlp import SwiGLU, swiglu_width
from vgen.layers.norm import RMSNorm
from vgen.runtime import pick_device, pick_dtype

HEADER = "| rows | step | tile | us | TB/s | plain us | times faster | error | plain error |\n" + "|---" * 9 + "|"
CACHE_ROWS = 64
SWEEP = {  # most rows: tiles
    4: [
        fused.Tile(8, 1024, 0, 4),
        fused.Tile(4, 1024, 0, 4),
        fused.Tile(4, 512, 0, 2),
        fused.Tile(8, 2048, 0, 8),
        fused.Tile(8, 128, 4, 4, 4),
        fused.Tile(16, 64, 4, 4, 4),
    ],
    16: [
        fused.Tile(8, 128, 4, 4, 4),
        fused.Tile(8, 64, 4, 4, 4),
        fused.Tile(16, 64, 4, 4, 4),
        fused.Tile(16, 64, 8, 8, 3),
    ],
    32: [
        fused.Tile(8, 64, 4, 4, 4),
        fused.Tile(16, 64, 4, 4, 4),
        fused.Tile(16, 64, 8, 8, 3),
        fused.Tile(32, 64, 2, 4, 4),
    ],
    64: [
        fused.Tile(16, 64, 4, 4, 3),
        fused.Tile(32, 64, 2, 4, 4),
        fused.Tile(32, 64, 4, 8, 3),
        fused.Tile(32, 32, 4, 4, 4),
    ],
}


@dataclass
class Case:
    """Blocks of many layers and what a pass gives them.

    Attributes:
        blocks: the layers.
        x: residual stream [B, 1, dim].
        hidden: inside the feed-forward layer, [B, 1, hidden].
        view: rotary rows, cache of one layer and cache rows.
    """

    blocks: list[Block]
    x: Tensor
    hidden: Tensor
    view: View

    @classmethod
    def make(cls, blocks: list[Block], rows: int) -> "Case":
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
        return cls(blocks, x, hidden, view)

    def exact(self) -> "Case":
        """The first layer and its inputs in float32."""
        case = Case.make([copy.deepcopy(self.blocks[0]).float()], len(self.x))
        return Case(
            case.blocks, self.x.float(), self.hidden.float(), View(**{**vars(case.view), "rope": self.view.rope})
        )


@dataclass(frozen=True)
class Step:
    """One step of a block.

    Attributes:
        name: for the table.
        weights: numbers in the weights it reads.
        plain: by the plain layers.
        ours: by the kernels; the tile is None for those that have none.
        tiled: whether it takes a tile.
    """

    name: str
    weights: int
    plain: Callable[[Case, Block], Tensor]
    ours: Callable[[Case, Block, fused.Tile | None], Tensor]
    tiled: bool = True


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


def _our_project(case: Case, block: Block, tile: fused.Tile | None) -> Tensor:
    assert case.view.cache is not None
    assert case.view.rows is not None
    attention = block.attention
    query = case.x.new_empty(len(case.x), 1, attention.heads, attention.head_dim)
    targets = (query, *case.view.cache.buffer[0], case.view.rope, case.view.rows)
    fused.project_rows(case.x, parts(block)[0], attention.wqkv.weight, *targets, tile)
    return _with_cache(case, query)


def _our_rotate(case: Case, block: Block, tile: fused.Tile | None) -> Tensor:
    return _with_cache(case, fused.before(case.x, parts(block)[0], block.attention, case.view, 0).transpose(1, 2))


def _with_cache(case: Case, query: Tensor) -> Tensor:
    if len(case.blocks) > 1:
        return query
    assert case.view.cache is not None
    return torch.cat([query.transpose(1, 2), *case.view.cache.window(0, 5, 1)], 1)


def _plain_gate(case: Case, block: Block) -> Tensor:
    _, norm, feed_forward = parts(block)
    normal = norm(case.x)
    return F.silu(feed_forward.w1(normal)) * feed_forward.w3(normal)


def _our_gate(case: Case, block: Block, tile: fused.Tile | None) -> Tensor:
    _, norm, feed_forward = parts(block)
    return fused.gate_rows(case.x, norm, feed_forward.w1.weight, feed_forward.w3.weight, tile)


def _many_gate(case: Case, block: Block, tile: fused.Tile | None) -> Tensor:
    _, norm, feed_forward = parts(block)
    return fused.gate_many(F.linear(fused.norm_many(case.x, norm)[1], feed_forward.merged()))


def steps_of(block: Block, rows: int) -> list[Step]:
    """The steps that a pass of this many rows takes."""
    feed_forward = parts(block)[2]
    project, out, first, second = (
        layer.weight.numel() for layer in (block.attention.wqkv, block.attention.wo, feed_forward.w1, feed_forward.w2)
    )
    if rows > fused.FEW:
        return [
            Step("norm, project, rotate", project, _plain_project, _our_rotate, tiled=False),
            Step("norm, product, gate", 2 * first, _plain_gate, _many_gate, tiled=False),
        ]
    return [
        Step("project", project, _plain_project, _our_project),
        Step(
            "add (wo)",
            out,
            lambda case, block: case.x + block.attention.wo(case.x),
            lambda case, block, tile: fused.add_rows(case.x, block.attention.wo.weight, case.x, tile),
        ),
        Step("gate", 2 * first, _plain_gate, _our_gate),
        Step(
            "add (w2)",
            second,
            lambda case, block: case.x + parts(block)[2].w2(case.hidden),
            lambda case, block, tile: fused.add_rows(case.hidden, parts(block)[2].w2.weight, case.x, tile),
        ),
    ]


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


def tiles_for(step: Step, rows: int, sweep: bool) -> list[fused.Tile | None]:
    """None stands for the tile that is used."""
    if not (step.tiled and sweep):
        return [None]
    return [None, *next(tiles for most, tiles in SWEEP.items() if rows <= most)]


def lines_for(case: Case, rows: int, sweep: bool) -> Iterator[str]:
    """Table lines of the steps of a number of rows."""
    one, exact = Case([case.blocks[0]], case.x, case.hidden, case.view), case.exact()
    size = case.x.element_size()
    for step in steps_of(case.blocks[0], rows):
        best = step.plain(exact, exact.blocks[0])
        plain_error = error(step.plain(one, one.blocks[0]), best)
        plain = seconds_per_layer(case, lambda block, step=step: step.plain(case, block))
        for tile in tiles_for(step, rows, sweep):
            name = "" if not step.tiled else "used" if tile is None else _tile_name(tile)
            start = f"| {rows} | {step.name} | {name} |"
            try:
                off = error(step.ours(one, one.blocks[0], tile), best)
                ours = seconds_per_layer(case, lambda block, step=step, tile=tile: step.ours(case, block, tile))
            except Exception as failure:
                # A tile that does not fit the device is a result of the sweep, not its end.
                if tile is None or "out of resource" not in str(failure):
                    raise
                yield f"{start} does not fit |"
                continue
            yield (
                f"{start} {ours * 1e6:.2f} | {step.weights * size / ours / 1e12:.2f} | {plain * 1e6:.2f} "
                f"| {plain / ours:.2f} | {off:.1e} | {plain_error:.1e} |"
            )


def _tile_name(tile: fused.Tile) -> str:
    return f"{tile.columns} x {tile.inner}, split {tile.split}, {tile.warps} warps, {tile.stages} stages"


def layer_line(case: Case, rows: int) -> str:
    """Table line of whole blocks without their attention, each fed by the one in front."""

    def chain(step: Callable[[Block, Tensor], Tensor]) -> float:
        state = [case.x]

        def work(block: Block) -> Tensor:
            if block is case.blocks[0]:
                state[0] = case.x.clone()
            state[0] = step(block, state[0])
            return state[0]

        return seconds_per_layer(case, work)

    def plain(block: Block, x: Tensor) -> Tensor:
        assert case.view.cache is not None
        query, _, _ = block.before(x, case.view.rope, (), case.view.cache.window(0, 5, 1))
        return block.behind(x, query.transpose(1, 2).flatten(2), ())

    def ours(block: Block, x: Tensor) -> Tensor:
        first, second, feed_forward = parts(block)
        query = fused.before(x, first, block.attention, case.view, 0)
        return fused.behind(x, query.transpose(1, 2).flatten(2), second, block.attention, feed_forward)

    slow, fast = chain(plain), chain(ours)
    with patch.object(fused, "_comes_early", lambda device: False):
        late = chain(ours)
    weights = sum(p.numel() for p in case.blocks[0].parameters() if p.dim() == 2) * case.x.element_size()
    return (
        f"| {rows} | layer | | {fast * 1e6:.2f} | {weights / fast / 1e12:.2f} | {slow * 1e6:.2f} | {slow / fast:.2f} "
        f"| not launched early: | {late * 1e6:.2f} us |"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="L")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8, 16, 32, 64, 512, 1024, 4096])
    parser.add_argument("--layers", type=int, default=48, help="weights that are read one after the other")
    parser.add_argument("--sweep", action="store_true", help="time other tiles too")
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
        dim, _, heads = SIZES[given.size]
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
            blocks = [Block(shape, drop_path=0.0).to(dtype).eval().requires_grad_(False) for _ in range(given.layers)]
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(f"{name}, torch {torch.__version__}, size {given.size}, {dtype}\n{HEADER}", flush=True)
        for rows in given.rows:
            case = Case.make(blocks, rows)
            for line in lines_for(case, rows, given.sweep):
                print(line, flush=True)
            print(layer_line(case, rows), flush=True)


if __name__ == "__main__":
    main()
