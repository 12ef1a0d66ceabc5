"""Products of a decoding pass of few rows and what lies around them, one Triton kernel each."""

from functools import cache
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor

from vgen.layers.handoff import Handoff
from vgen.layers.many_rows import (
    empty_handoff,
    hand_off,
    head_constants,
    launch,
    projection_targets,
    scale_of,
)
from vgen.layers.norm import RMSNorm
from vgen.layers.tiles import Kind, Product, Tile, best_tile, ceil_division, power_of_two


@cache
def _kernels() -> ModuleType:
    """Without triton their file cannot be imported."""
    from vgen.layers import few_row_kernels

    return few_row_kernels


def tile_for(product: Product, x: Tensor, weight: Tensor) -> Tile | None:
    """How to cut a product of x [B, F, K] with a weight [N, K] on its device; None = by the vendor's library."""
    # Wider numbers have no tensor cores that keep their precision.
    if x.element_size() != 2:
        return None
    shared = {"shared_bytes": _shared_bytes(x.device)} if x.is_cuda else {}
    return best_tile(product, x.shape[0] * x.shape[1], weight.shape[1], **shared)


@cache
def _shared_bytes(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    # What an older PyTorch does not tell is what every GPU of compute capability 8.0 and newer has.
    return getattr(properties, "shared_memory_per_block_optin", 101376)


def project_rows(
    x: Tensor,
    norm: RMSNorm,
    weight: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rope: Tensor | None,
    cache_rows: Tensor,
    tile: Tile,
    *,
    ready: Handoff | None = None,
) -> None:
    """Queries into ``query``, keys and values into a layer of the cache, of few rows.

    Args:
        x: [B, F, dim].
        norm: in front of the projection.
        weight: [(heads + 2 kv_heads) * head_dim, dim].
        query: [B, F, heads, head_dim], contiguous.
        keys: [B, kv_heads, rows, head_dim], every head contiguous.
        values: like keys.
        rope: see :class:`vgen.layers.attention.View`, like the next.
        cache_rows: int64 [F] or [B, F].
        tile: how the product is cut.
        ready: what is done of the norm of x; None = done here first.
    """
    assert tile.splits == 1, "only add_rows shares an inner axis among programs"
    ready = ready or hand_off(x, norm)
    rows = x.shape[0] * x.shape[1]
    launch(
        _kernels().project_rows,
        (ceil_division(len(weight), tile.columns),),
        x,
        (ready.scaled, ready.squares, weight, *projection_targets(query, keys, values, rope, cache_rows), norm.eps),
        tile,
        PARTIALS=len(ready.squares),
        **head_constants(query, keys, rope),
        **kernel_constants(weight, tile, rows),
    )


def add_rows(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    tile: Tile,
    *,
    dtype: torch.dtype | None = None,
    arrivals: Tensor | None = None,
    following: RMSNorm | None = None,
) -> tuple[Tensor, Handoff | None]:
    """Sum residual + x W^T of few rows, [B, F, N], and what is left for the norm behind it.

    Args:
        x: [B, F, K].
        weight: [N, K].
        residual: [B, F, N]; None = the product alone.
        tile: how the product is cut.
        dtype: of the result; None = that of x.
        arrivals: where programs that share columns count, cleared by :func:`gate_rows`; None = cleared here if needed.
        following: the norm behind; None = nothing is left for one.
    """
    out = torch.empty(*x.shape[:2], len(weight), dtype=dtype or x.dtype, device=x.device)
    rows = x.shape[0] * x.shape[1]
    shares = out
    if tile.splits > 1:
        shares = torch.empty(tile.splits, rows, len(weight), dtype=torch.float32, device=x.device)
        arrivals = arrivals_of(weight, tile).zero_() if arrivals is None else arrivals
    # The kernel does not read or write what stands in for something.
    ready, handed = None, (out, out, out)
    if following is not None:
        ready = empty_handoff(out, following, ceil_division(len(weight), tile.columns))
        handed = (scale_of(following, out), ready.scaled, ready.squares)
    launch(
        _kernels().add_rows,
        (ceil_division(len(weight), tile.columns), tile.splits),
        x,
        (
            x.contiguous(),
            weight,
            x if residual is None else residual.contiguous(),
            out,
            shares,
            out if arrivals is None else arrivals,
            *handed,
            rows,
        ),
        tile,
        ADD=residual is not None,
        SPLITS=tile.splits,
        SQUARED=ready is not None,
        NEXT_SCALED=following is not None and following.weight is not None,
        **kernel_constants(weight, tile, rows),
    )
    return out, ready


def gate_rows(
    x: Tensor,
    norm: RMSNorm,
    weights: Tensor,
    tile: Tile,
    *,
    clears: Tensor | None = None,
    ready: Handoff | None = None,
) -> Tensor:
    """Gated products silu(norm(x) W^T) (norm(x) V^T) of few rows, [B, F, hidden].

    Args:
        x: [B, F, dim].
        norm: in front of the products.
        weights: W above V, [2 * hidden, dim].
        tile: how the product is cut.
        clears: int32 [a power of two], set to 0 for the kernel behind.
        ready: what is done of the norm of x; None = done here first.
    """
    assert tile.splits == 1, "only add_rows shares an inner axis among programs"
    ready = ready or hand_off(x, norm)
    rows, hidden = x.shape[0] * x.shape[1], len(weights) // 2
    out = x.new_empty(*x.shape[:2], hidden)
    launch(
        _kernels().gate_rows,
        (ceil_division(hidden, tile.columns),),
        x,
        (ready.scaled, ready.squares, weights, out, out if clears is None else clears, rows, norm.eps),
        tile,
        CLEARED=0 if clears is None else len(clears),
        PARTIALS=len(ready.squares),
        **kernel_constants(weights[:hidden], tile, rows),
    )
    return out


def arrivals_of(weight: Tensor, tile: Tile) -> Tensor:
    """A counter, not cleared, for every program along the columns of a product."""
    count = power_of_two(ceil_division(len(weight), tile.columns))
    return torch.empty(count, dtype=torch.int32, device=weight.device)


def kernel_constants(weight: Tensor, tile: Tile, rows: int) -> dict[str, Any]:
    """What a kernel of few rows is compiled for."""
    outer, inner = weight.shape
    return {
        "N": outer,
        "K": inner,
        # A matrix product wants 8 rows of its second operand.
        "ROWS": power_of_two(rows) if tile.kind == "by_row" else max(8, power_of_two(rows)),
        "COLUMNS": tile.columns,
        "INNER": tile.inner,
        "KIND": get_args(Kind).index(tile.kind),
        "PARTS": tile.parts,
        "FLYING": tile.stages,
    }
