"""All blocks of a decoding pass of few rows in one launch of programs that stay; the kernel is in the file beside."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor

from vgen.layers.attention import Attention, View
from vgen.layers.fused import can_run, interpreted
from vgen.layers.mlp import SwiGLU
from vgen.layers.norm import RMSNorm
from vgen.layers.short_attention import aligned_bias, runs_here
from vgen.layers.tiles import Kind, Product, Tile, power_of_two

_LONGEST = 640  # prefix that one program per head reads in good time
_MOST_QUERIES = 64
_MOST_SPILLS = 64  # registers of a thread that do not fit; with more of them a launch per step is faster


@dataclass(frozen=True)
class Cut:
    """How the blocks of a pass are cut.

    Attributes:
        tiles: of the products; their warps and early launch are not used.
        warps: per program.
        programs: per multiprocessor.
        keys: settled rows per tile of the attention.
        held: tiles of them that are asked for ahead.
    """

    tiles: Mapping[Product, Tile]
    warps: int
    programs: int
    keys: int = 128
    held: int = 2


Cuts = Sequence[tuple[int, Sequence[Cut]]]
"""Most rows and the cuts, of which the first that the device holds is used; none = a launch per step, see
:mod:`vgen.layers.fused`."""

_cuts: Cuts = (
    (
        2,
        (
            Cut(
                {
                    "project": Tile("by_row", 16, 512, 4),
                    "wo": Tile("by_row", 4, 1024, 4),
                    "gate": Tile("by_row", 16, 512, 4),
                    "w2": Tile("by_row", 4, 1024, 4),
                },
                warps=4,
                programs=2,
            ),
        ),
    ),
)


def cuts_in_use() -> Cuts:
    """The table that passes are cut by."""
    return _cuts


def use_cuts(cuts: Cuts) -> None:
    """Replace the table; recorded graphs keep their cuts."""
    global _cuts
    _cuts = cuts


@dataclass(frozen=True)
class PlainBlock:
    """The parts of a block of the kind that :func:`vgen.layers.fused.is_plain` knows."""

    attention_norm: RMSNorm
    attention: Attention
    ffn_norm: RMSNorm
    feed_forward: SwiGLU


class PersistentBlocks:
    """Blocks of one shape, and where their weights lie.

    Args:
        blocks: plain blocks in their order.
    """

    def __init__(self, blocks: Sequence[PlainBlock]) -> None:
        self.blocks = blocks
        self._addresses: list[int] = []
        self._table = torch.empty(0, dtype=torch.int64)
        self._resident: dict[tuple[Any, ...], bool] = {}

    @staticmethod
    def fits(blocks: Sequence[PlainBlock]) -> bool:
        """Whether plain blocks are of one shape, which the kernel is compiled for."""
        return len({_shape(block) for block in blocks}) == 1

    def run(self, x: Tensor, view: View, states: int) -> list[Tensor] | None:
        """The residual streams behind the last blocks.

        Args:
            x: [B, F, dim].
            view: visibility, rotary rows, cache and cache rows.
            states: how many blocks.

        Returns:
            ``states`` of [B, F, dim]; None if the kernel is not for such a pass.
        """
        attention = self.blocks[0].attention
        rows = x.shape[0] * x.shape[1]
        cuts = next((cuts for most, cuts in _cuts if rows <= most), ())
        if not cuts or not runs_persistently(x, attention, view) or view.prefix > _LONGEST:
            return None
        return self._launch(x.contiguous(), view, cuts, states)

    def _launch(self, x: Tensor, view: View, cuts: Sequence[Cut], states: int) -> list[Tensor] | None:
        assert view.cache is not None
        assert view.rows is not None
        block, buffer = self.blocks[0], view.cache.buffer
        attention, (batch, fed, dim) = block.attention, x.shape
        rows, layers, hidden = batch * fed, len(self.blocks), block.feed_forward.w1.out_features
        width = attention.heads * attention.head_dim
        streams = x.new_empty(layers + 1, rows, dim)
        streams[0].copy_(x.view(rows, dim))
        query, seen, middle, inside = (x.new_empty(rows, n) for n in (width, width, dim, hidden))
        counters = torch.zeros(1 + layers * _kernel().STEPS.value, dtype=torch.int32, device=x.device)
        rope = x if view.rope is None else view.rope.contiguous()
        cache_rows = view.rows.contiguous()
        bias = x if view.mask is None else aligned_bias(view.mask, view.prefix)
        group = attention.heads // attention.kv_heads
        queries = min(max(16, power_of_two(group * fed)), _MOST_QUERIES)
        arguments = (
            self._pointers(x.device),
            streams,
            query,
            seen,
            middle,
            inside,
            buffer,
            rope,
            cache_rows,
            bias,
            counters,
            layers,
            rows,
            fed,
            view.prefix,
            view.settled,
            batch * attention.kv_heads,
            -(-group * fed // queries),
            0 if view.rope is None or view.rope.dim() == 3 else rope.stride(0),
            cache_rows.stride(0) if cache_rows.dim() == 2 else 0,
            *buffer.stride()[:4],
            0 if view.mask is None else bias.stride(0),
            block.attention_norm.eps,
            block.ffn_norm.eps,
            math.log2(math.e) / math.sqrt(attention.head_dim),
        )
        shape = {
            "HEADS": attention.heads,
            "KV_HEADS": attention.kv_heads,
            "HEAD_DIM": attention.head_dim,
            "DIM": dim,
            "HIDDEN": hidden,
            "ROPE": view.rope is not None,
            "SCALED": block.ffn_norm.weight is not None,
            "BIASED": view.mask is not None,
            "WIDTH": max(16, power_of_two(attention.head_dim)),
            "QUERIES": queries,
            "FRESH": queries,
        }
        # Triton launches on the current device.
        with torch.cuda.device_of(x):
            for cut in cuts:
                programs = 1 if interpreted() else cut.programs * _multiprocessors(x.device)
                constants = shape | cut_constants(cut, rows) | {"PROGRAMS": programs}
                if interpreted() or self._all_resident(arguments, constants, cut, programs):
                    _kernel().run_blocks[(programs,)](*arguments, **constants, **_options(cut))
                    return [streams[layers + 1 - states + number].view_as(x) for number in range(states)]
        return None

    def _all_resident(self, arguments: tuple[Any, ...], constants: dict[str, Any], cut: Cut, programs: int) -> bool:
        """Whether the device holds all programs at once, without which they would wait for each other for ever."""
        key = tuple(constants.items())
        if key not in self._resident:
            compiled = _kernel().run_blocks.warmup(*arguments, grid=(programs,), **constants, **_options(cut))
            compiled._init_handles()
            self._resident[key] = _fits(compiled.n_regs, compiled.n_spills, compiled.metadata.shared, cut)
        return self._resident[key]

    def _pointers(self, device: torch.device) -> Tensor:
        """Addresses of all weights, int64 [layers, 6], made anew once weights have moved."""
        addresses = [weight.data_ptr() for block in self.blocks for weight in _weights(block)]
        if addresses != self._addresses or self._table.device != device:
            self._table = torch.tensor(addresses, dtype=torch.int64, device=device)
            self._addresses = addresses
        return self._table


def runs_persistently(x: Tensor, attention: Attention, view: View) -> bool:
    """Whether a call is one that the kernel knows, but for its length."""
    if view.blocks is not None or not can_run(x, attention, view):
        return False
    assert view.cache is not None
    query = x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    return runs_here(query, view.cache.buffer[0, 0], view.mask) and (interpreted() or _is_hopper(x.device))


def cut_constants(cut: Cut, rows: int) -> dict[str, Any]:
    """What the kernel is compiled for, of a cut and a number of rows."""
    names: dict[str, Product] = {"PROJECT": "project", "WO": "wo", "GATE": "gate", "W2": "w2"}
    by_row = all(tile.kind == "by_row" for tile in cut.tiles.values())
    return {
        # A matrix product wants 8 rows of its second operand.
        "ROWS": power_of_two(rows) if by_row else max(8, power_of_two(rows)),
        **{name: _numbers(cut.tiles[product]) for name, product in names.items()},
        "KEYS": cut.keys,
        "HELD": cut.held,
    }


def _options(cut: Cut) -> dict[str, Any]:
    together = {} if interpreted() else {"launch_cooperative_grid": True}
    return {"num_warps": cut.warps, "num_stages": 1, **together}


def _fits(registers: int, spills: int, shared_bytes: int, cut: Cut) -> bool:
    """Whether a multiprocessor of a Hopper GPU holds the programs of a cut."""
    # Registers are given out to warps, 256 at a time.
    of_a_program = cut.warps * 32 * (-(-registers // 8) * 8)
    return (
        spills <= _MOST_SPILLS
        and of_a_program * cut.programs <= 65536
        and (shared_bytes + 1024) * cut.programs <= 233472
    )


def _numbers(tile: Tile) -> tuple[int, int, int, int, int]:
    return get_args(Kind).index(tile.kind), tile.columns, tile.inner, tile.parts, tile.stages


def _weights(block: PlainBlock) -> list[Tensor]:
    attention, feed_forward = block.attention, block.feed_forward
    matrices = [attention.wqkv.weight, attention.wo.weight, feed_forward.merged(), feed_forward.w2.weight]
    # The kernel does not read what stands in for a scale.
    return matrices + [matrices[0] if n.weight is None else n.weight for n in (block.attention_norm, block.ffn_norm)]


def _shape(block: PlainBlock) -> tuple[Any, ...]:
    attention, norms = block.attention, (block.attention_norm, block.ffn_norm)
    return (
        attention.wqkv.weight.shape,
        attention.heads,
        attention.kv_heads,
        block.feed_forward.w1.weight.shape,
        tuple((norm.eps, norm.weight is None) for norm in norms),
    )


@cache
def _kernel() -> ModuleType:
    """Without triton its file cannot be imported."""
    from vgen.layers import persistent_kernel

    return persistent_kernel


@cache
def _is_hopper(device: torch.device) -> bool:
    """Whether the device is what the cuts were measured on; others have their own numbers of registers and programs."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
