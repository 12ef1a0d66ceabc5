"""What lies around the products of a decoding pass, as Triton kernels; products by the vendor's library."""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vgen.layers.early_launch import early_launch
from vgen.layers.handoff import Handoff
from vgen.layers.norm import RMSNorm
from vgen.layers.tiles import Tile, ceil_division, power_of_two


@cache
def _kernels() -> ModuleType:
    """Without triton their file cannot be imported."""
    from vgen.layers import many_row_kernels

    return many_row_kernels


def embed_rows(
    table: Tensor, ids: Tensor, index: Tensor, *, following: RMSNorm | None = None
) -> tuple[Tensor, Handoff | None]:
    """Vectors [B, F, dim] of some tokens and, with a norm that comes next, what that need not do.

    Args:
        table: [V, dim].
        ids: int64 [B, N].
        index: int64 [F] or [B, F], columns of ids.
        following: the norm; None = nothing is left for one.
    """
    batch, fed, dim = len(ids), index.shape[-1], table.shape[1]
    assert ids.stride(1) == 1
    out = table.new_empty(batch, fed, dim)
    # The kernel does not read or write what stands in for something.
    ready, handed = None, (out, out, out)
    if following is not None:
        ready = empty_handoff(out, following, 1)
        handed = (scale_of(following, out), ready.scaled, ready.squares)
    index = index.contiguous()
    launch(
        _kernels().embed_rows,
        (batch * fed,),
        table,
        (table, ids, index, out, *handed, fed, ids.stride(0), 0 if index.dim() == 1 else fed),
        K=dim,
        SQUARED=ready is not None,
        SCALED=following is not None and following.weight is not None,
        INNER=power_of_two(dim),
    )
    return out, ready


def add_product(x: Tensor, seen: Tensor, weight: Tensor) -> Tensor:
    """Sum x + seen W^T by the vendor's library, [B, F, N]."""
    return torch.addmm(x.reshape(-1, x.shape[-1]), seen.reshape(-1, seen.shape[-1]), weight.t()).view(x.shape)


def add_product_in_place(x: Tensor, seen: Tensor, weight: Tensor) -> Tensor:
    """The same in place."""
    x.view(-1, x.shape[-1]).addmm_(seen.view(-1, seen.shape[-1]), weight.t())
    return x


def norm_many(x: Tensor, norm: RMSNorm, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum x + delta (x itself without one) and its norm, [B, F, dim]."""
    x = x.contiguous()
    total = x if delta is None else torch.empty_like(x)
    normal = torch.empty_like(x)
    rows, dim = x.shape[0] * x.shape[1], x.shape[2]
    launch(
        _kernels().norm_many,
        (rows,),
        x,
        (x, x if delta is None else delta, scale_of(norm, x), total, normal, rows, norm.eps),
        K=dim,
        ADD=delta is not None,
        SCALED=norm.weight is not None,
        ROWS=1,
        INNER=power_of_two(dim),
    )
    return total, normal


def norm_gathered(x: Tensor, norm: RMSNorm, sources: Tensor, shares: Tensor | None) -> Tensor:
    """Norms [B, D, dim] of the slots that targets are read from, times their shares; see vgen.layers.fused.read."""
    batch, fed, dim = x.shape
    out = x.new_empty(batch, len(sources), dim)
    launch(
        _kernels().norm_gathered,
        (batch * len(sources),),
        x,
        (x.contiguous(), scale_of(norm, x), sources, x if shares is None else shares, out, fed, len(sources), norm.eps),
        K=dim,
        SCALED=norm.weight is not None,
        SHARED=shares is not None,
        INNER=power_of_two(dim),
    )
    return out


def rotate_many(
    projected: Tensor, query: Tensor, keys: Tensor, values: Tensor, rope: Tensor | None, cache_rows: Tensor
) -> None:
    """Rotate projections [B, F, (heads + 2 kv_heads) * head_dim]; the rest as in vgen.layers.few_rows.project_rows."""
    rows, width = query.shape[0] * query.shape[1], projected.shape[-1]
    columns = min(1024, power_of_two(width))
    launch(
        _kernels().rotate_many,
        (rows, ceil_division(width, columns)),
        query,
        (projected, *projection_targets(query, keys, values, rope, cache_rows)),
        **head_constants(query, keys, rope),
        ROWS=1,
        COLUMNS=columns,
    )


def join_rotated(query: Tensor, key: Tensor, value: Tensor, rope: Tensor) -> Tensor:
    """Gradients of projections [B, F, (heads + 2 kv_heads) * head_dim] from those of what they became.

    Args:
        query: gradient of rotated queries, [B, heads, F, head_dim].
        key: of rotated keys, [B, kv_heads, F, head_dim].
        value: of values, likewise.
        rope: see :class:`vgen.layers.attention.View`.
    """
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    batch, heads, fed, head_dim = query.shape
    kv_heads, rope = key.shape[1], rope.contiguous()
    width = (heads + 2 * kv_heads) * head_dim
    columns = min(1024, power_of_two(width))
    out = query.new_empty(batch, fed, width)
    # Triton launches on the current device.
    with torch.cuda.device_of(out):
        _kernels().join_rotated[(batch * fed, ceil_division(width, columns))](
            query,
            key,
            value,
            rope,
            out,
            batch * fed,
            fed,
            0 if rope.dim() == 3 else rope.stride(0),
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            COLUMNS=columns,
            num_warps=4,
        )
    return out


def gate_many(both: Tensor) -> Tensor:
    """Product silu(a) b of the halves of [B, F, 2 * hidden]."""
    rows, hidden = both.shape[0] * both.shape[1], both.shape[2] // 2
    out = both.new_empty(*both.shape[:2], hidden)
    columns = min(1024, power_of_two(hidden))
    launch(
        _kernels().gate_many,
        (rows, ceil_division(hidden, columns)),
        both,
        (both, out, rows),
        N=hidden,
        ROWS=1,
        COLUMNS=columns,
    )
    return out


def empty_handoff(x: Tensor, norm: RMSNorm, parts: int) -> Handoff:
    """Takes what is done of a norm of x, the sums of squares in so many parts; without a scale x is as good."""
    squares = torch.empty(parts, x.shape[0] * x.shape[1], dtype=torch.float32, device=x.device)
    return Handoff(x, x if norm.weight is None else torch.empty_like(x), squares)


def hand_off(x: Tensor, norm: RMSNorm) -> Handoff:
    """What can be done of a norm in front of the product, in a kernel of its own."""
    x = x.contiguous()
    ready = empty_handoff(x, norm, 1)
    launch(
        _kernels().hand_off_rows,
        (x.shape[0] * x.shape[1],),
        x,
        (x, scale_of(norm, x), ready.scaled, ready.squares),
        K=x.shape[2],
        SCALED=norm.weight is not None,
        INNER=power_of_two(x.shape[2]),
    )
    return ready


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    x: Tensor,
    arguments: tuple[Any, ...],
    tile: Tile | None = None,
    **constants: Any,
) -> None:
    """Start a kernel of this file or of vgen.layers.few_rows, without a tile by 4 warps."""
    options: dict[str, Any] = {"num_warps": 4} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    options |= early_launch(x.device, tile is None or tile.early)
    # Triton launches on the current device.
    with torch.cuda.device_of(x):
        kernel[grid](*arguments, **constants, **options)


def scale_of(norm: RMSNorm, x: Tensor) -> Tensor:
    """The learned scale of a norm of x, or x, which the kernel does not read for it."""
    return x if norm.weight is None else norm.weight


def projection_targets(
    query: Tensor, keys: Tensor, values: Tensor, rope: Tensor | None, cache_rows: Tensor
) -> tuple[Tensor | int, ...]:
    """Where projections go and by what they are rotated, as the kernels take it."""
    batch, fed = query.shape[:2]
    assert keys.stride()[2:] == (keys.shape[-1], 1)
    assert keys.stride() == values.stride()
    table = query if rope is None else rope.contiguous()
    rope_batch = 0 if rope is None or rope.dim() == 3 else table.stride(0)
    cache_rows = cache_rows.contiguous()
    rows_batch = cache_rows.stride(0) if cache_rows.dim() == 2 else 0
    places = (rope_batch, rows_batch, keys.stride(0), keys.stride(1))
    return (query, keys, values, table, cache_rows, batch * fed, fed, *places)


def head_constants(query: Tensor, keys: Tensor, rope: Tensor | None) -> dict[str, Any]:
    """What kernels that write projections are compiled for."""
    return {
        "HEADS": query.shape[2],
        "KV_HEADS": keys.shape[1],
        "HEAD_DIM": query.shape[3],
        "ROPE": rope is not None,
    }
