"""Attention from few queries to the prefix of the key-value cache, as Triton kernels.

A decoding pass asks with 1 to about 30 queries per head and reads every key and value once: the time is that of the
bytes. The kernels of PyTorch are made for many queries and reach it for a single one only.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vgen.layers.cache import FLOAT8
from vgen.layers.early_launch import early_launch
from vgen.layers.interpreter import interpreted

_MOST_QUERIES = 64  # per key-value head; more are worth the kernels of PyTorch
_FEW_PROGRAMS = 264  # two for each multiprocessor of an H100 or H200
WAY_ROWS = 16
"""Rows of a held tile per warp."""
_TILE_BYTES = 16384  # keys per step: twice two tiles of keys and values stay within the shared memory of three programs


@dataclass(frozen=True)
class Tile:
    """How a call is cut into programs.

    Attributes:
        rows: rows of the prefix per step, of every head.
        shared: key-value heads per program.
        queries: queries per program, all its heads together.
        warps: per program; with rows held one for every WAY_ROWS of a step.
        stages: one more than tiles in flight; 1 = keys and values of a tile come one after the other.
        span: steps per split of the prefix; 0 = not split.
        early: launched before the kernel in front has ended (programmatic dependent launch).
        held: tiles of settled rows asked for before the kernel in front has ended; the other rows then have tiles of
            their own.
    """

    rows: int
    shared: int
    queries: int
    warps: int
    stages: int
    span: int = 0
    early: bool = False
    held: int = 0


def pick_tile(
    *, heads: int, kv_heads: int, batch: int, fed: int, prefix: int, width: int, itemsize: int = 2, settled: int = 0
) -> Tile:
    """How to cut a call.

    Args:
        heads: query heads.
        kv_heads: key-value heads.
        batch: samples, branches counted.
        fed: queries of a head.
        prefix: rows of the cache that are visible.
        width: numbers of a head.
        itemsize: bytes of a number of the cache.
        settled: as in :func:`short_attention`.
    """
    asked = heads // kv_heads * fed
    queries = min(max(16, _power_of_two(asked)), _MOST_QUERIES)
    row_bytes = _power_of_two(width * itemsize)
    fits = max(16, _TILE_BYTES // row_bytes)
    rows = max(16, _power_of_two(prefix))
    if batch * kv_heads * -(-asked // queries) <= _FEW_PROGRAMS:
        # Too few to fill the device: each has all it can in flight, and a long prefix is shared out.
        rows = min(max(2 * WAY_ROWS, _power_of_two(max(settled, prefix - settled))), fits, 128)
        held = min(_most_held(queries, _power_of_two(width)), -(-settled // rows))
        if not held:
            rows = min(max(16, _power_of_two(prefix)), fits, 128)
        span = 256 // rows if prefix > 512 else 0
        # What is not held is cut for fewer warps: faster with many queries (H100).
        warps = rows // WAY_ROWS if held else 8 if rows == 128 and queries < 32 else 4
        return Tile(rows, 1, queries, warps=warps, stages=3, span=span, early=True, held=held)
    fits = min(fits, 64)
    rows, shared = min(rows, fits), 1
    while 2 * shared * asked <= queries and kv_heads % (2 * shared) == 0 and 2 * shared * rows <= fits:
        shared *= 2
    warps = 4 if queries > 16 else 2
    if rows * shared == 16 and queries == 32 and row_bytes <= 128:
        # A step so small is done sooner by one warp, which waits for no other (H100: 40 against 45 us).
        warps = 1
    return Tile(rows, shared, queries, warps=warps, stages=2 if prefix <= rows else 3)


def _most_held(queries: int, dim: int) -> int:
    """Tiles that a warp has the registers for beside its queries and their results (compiled for Hopper)."""
    if dim > 128 or queries * dim > 4096:
        return 0
    return 1 if queries == 64 else 2


def runs_here(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether :func:`short_attention` takes these arguments, shaped as there, and is made for them.

    Products of float32 numbers do not run on the matrix units, so these stay with PyTorch.
    """
    return (
        ((query.is_cuda and query.element_size() == 2) or interpreted())
        and (query.dtype == key.dtype or reads_float8(query, key.dtype))
        and query.shape[2] * (query.shape[1] // key.shape[1]) <= _MOST_QUERIES
        and query.shape[-1] <= 256
        and (mask is None or (mask.is_floating_point() and (mask.dim() == 2 or mask.shape[1] == 1)))
        and not torch.is_grad_enabled()
        and _kernels() is not None
    )


def reads_float8(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels on the device of x read a cache of such numbers."""
    return dtype in FLOAT8 and (
        interpreted() or (x.is_cuda and torch.version.hip is None and _capability(x.device) >= (8, 9))
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def short_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    settled: int = 0,
    tile: Tile | None = None,
) -> Tensor:
    """Scaled dot-product attention for few queries; equal inputs give equal bits.

    Args:
        query: [B, heads, F, head_dim], any strides but the last.
        key: [B, kv_heads, P, head_dim], likewise, of the same dtype or float8_e4m3fn; kv_heads divides heads
            (grouped-query attention, repeated in blocks).
        value: like key.
        bias: [F, P], or every sample's own, [B, 1, F, P], added to the scores; -inf hides; taken as it is if made by
            :func:`vgen.layers.attention.additive_mask`, otherwise copied. A query that sees nothing gives zeros.
        settled: leading rows that earlier passes wrote: they may be read before the kernel in front has ended, see
            :func:`vgen.layers.early_launch.early_launch`.
        tile: how the call is cut; None = :func:`pick_tile`.

    Returns:
        [B, F, heads * head_dim].
    """
    kernels = _kernels()
    assert kernels is not None, "short_attention needs the package triton"
    batch, heads, fed, width = query.shape
    kv_heads, prefix = key.shape[1], key.shape[2]
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    if bias is not None and (bias.stride(-1) != 1 or bias.stride(-2) != _padded(prefix)):
        bias = F.pad(bias, (0, _padded(prefix) - prefix))
    if tile is None:
        tile = pick_tile(
            heads=heads,
            kv_heads=kv_heads,
            batch=batch,
            fed=fed,
            prefix=prefix,
            width=width,
            itemsize=key.element_size(),
            settled=settled,
        )
    # Without tiles of their own the other rows are cut like these.
    settled = settled if tile.held else prefix
    out = query.new_empty(batch, fed, heads * width)
    steps = -(-settled // tile.rows)
    splits = -(-steps // tile.span) if tile.span else 1
    target = peaks = sums = out
    if splits > 1:
        target = torch.empty(splits, batch, fed, heads * width, dtype=torch.float32, device=out.device)
        peaks, sums = torch.empty(2, splits, batch, fed, heads, dtype=torch.float32, device=out.device)
    group = heads // kv_heads
    dim = max(16, _power_of_two(width))
    asked = tile.shared * group * fed
    assert tile.shared == 1 or asked <= tile.queries, "heads that share a program must fit into it"
    assert tile.shared == 1 or not tile.held, "held rows are those of one head"
    assert not tile.held or tile.rows >= max(2, tile.warps) * WAY_ROWS, "a held tile is shared among warps"
    assert splits == 1 or tile.held <= tile.span, "a split holds rows of its own only"
    launch: dict[str, Any] = early_launch(query.device, tile.early)
    # Triton launches on the current device.
    with torch.cuda.device_of(query):
        kernels.attend_prefix[(batch * kv_heads // tile.shared, -(-asked // tile.queries), splits)](
            query,
            key,
            value,
            query if bias is None else bias,
            target,
            peaks,
            sums,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            0 if bias is None or bias.dim() == 2 else bias.stride(0),
            0 if bias is None else bias.stride(-2),
            fed,
            prefix,
            settled,
            tile.span if splits > 1 else steps,
            math.log2(math.e) / math.sqrt(width),
            KV_HEADS=kv_heads,
            GROUP=group,
            WIDTH=width,
            DIM=dim,
            SHARED=tile.shared,
            QUERIES=tile.queries,
            ROWS=tile.rows,
            HELD=tile.held,
            WAY_ROWS=tile.rows // tile.warps if tile.held else tile.rows,
            BIASED=bias is not None,
            SPLIT=splits > 1,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **launch,
        )
        if splits > 1:
            lines = batch * fed * heads
            kernels.combine_splits[(-(-lines // 4),)](
                target, peaks, sums, out, lines, splits, WIDTH=width, DIM=dim, LINES=4, num_warps=2, **launch
            )
    return out


def _padded(prefix: int) -> int:
    """Columns of an additive mask in memory."""
    return -(-prefix // 16) * 16


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


@cache
def _kernels() -> Any:
    """The kernels, or None without the package triton, which PyTorch brings along on Linux only."""
    try:
        from vgen.layers import short_attention_kernels
    except ImportError:
        return None
    return short_attention_kernels
