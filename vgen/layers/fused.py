"""A decoding pass of a Llama block in few kernels: all but its attention; the kernels are in two files beside this one.

Few rows: a product with every weight is one kernel that streams the weight once and does what lies before and behind
it. Many rows: products by the vendor's library, what lies between them in one kernel each.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgen.errors import UserError
from vgen.layers.attention import Attention, View
from vgen.layers.early_launch import early_launch
from vgen.layers.handoff import Handoff
from vgen.layers.interpreter import interpreted
from vgen.layers.mlp import SwiGLU
from vgen.layers.norm import RMSNorm
from vgen.layers.short_attention import reads_float8
from vgen.layers.tiles import FEW, Kind, Product, Tile, best_tile, power_of_two


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    """Those of few and of many rows; without triton their files cannot be imported."""
    from vgen.layers import few_row_kernels, many_row_kernels

    return few_row_kernels, many_row_kernels


@cache
def why_not(device: torch.device) -> str | None:
    """What is missing on a device to run the kernels; None = nothing."""
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"its kernels need a CUDA device and this one is {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"its kernels need a GPU of compute capability 8.0 or newer, not {torch.cuda.get_device_name(device)}"
    return None


def check_available(device: torch.device) -> None:
    """Refuse a device without the kernels.

    Raises:
        UserError: saying what is missing.
    """
    if reason := why_not(device):
        raise UserError(f"engine=fused is not available: {reason}; use engine=auto")


def is_plain(norms: tuple[nn.Module, ...], attention: Attention, feed_forward: nn.Module) -> bool:
    """Whether the kernels know these layers: RMS norms, SwiGLU, no biases, no norms of queries and keys."""
    if not isinstance(feed_forward, SwiGLU) or attention.q_norm is not None:
        return False
    linear = (attention.wqkv, attention.wo, feed_forward.w1, feed_forward.w2, feed_forward.w3)
    return all(isinstance(norm, RMSNorm) for norm in norms) and all(layer.bias is None for layer in linear)


def can_run(x: Tensor, attention: Attention, view: View) -> bool:
    """Whether a call is one the kernels know: a decoding pass without gradients in one dtype."""
    return (
        view.cache is not None
        and view.rows is not None
        and not attention.training
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and x.dtype == attention.wqkv.weight.dtype
        and (x.dtype == view.cache.buffer.dtype or reads_float8(x, view.cache.buffer.dtype))
        and why_not(x.device) is None
    )


def can_embed(table: nn.Embedding) -> bool:
    """Whether :func:`embed` takes the rows of a table of vectors in a decoding pass."""
    return (
        table.max_norm is None
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(table.weight.device.type)
        and table.weight.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and why_not(table.weight.device) is None
    )


def embed(
    table: Tensor, ids: Tensor, index: Tensor, *, following: nn.Module | None = None
) -> tuple[Tensor, Handoff | None]:
    """Vectors of some tokens.

    Args:
        table: [V, dim].
        ids: int64 [B, N].
        index: int64 [F] or [B, F], columns of ids.
        following: the norm that comes next; None = it is not known.

    Returns:
        [B, F, dim] and, with few rows and a norm the kernels know, what that need not do.
    """
    batch, fed, dim = len(ids), index.shape[-1], table.shape[1]
    assert ids.stride(1) == 1
    out = table.new_empty(batch, fed, dim)
    ready, handed = None, (out, out, out)
    scales = False
    if isinstance(following, RMSNorm) and batch * fed <= FEW:
        ready, scales = _empty_handoff(out, following, 1), following.weight is not None
        handed = (_scale(following, out), ready.scaled, ready.squares)
    index = index.contiguous()
    _launch(
        _kernels()[1].embed_rows,
        (batch * fed,),
        table,
        (table, ids, index, out, *handed, fed, ids.stride(0), 0 if index.dim() == 1 else fed),
        K=dim,
        SQUARED=ready is not None,
        SCALED=scales,
        INNER=power_of_two(dim),
    )
    return out, ready


def before(x: Tensor, norm: RMSNorm, attention: Attention, view: View, layer: int) -> Tensor:
    """Norm, projection and rotation; keys and values go to the cache.

    Args:
        x: [B, F, dim].
        norm: in front of the attention.
        attention: whose projection it is.
        view: rotary rows, cache and cache rows.
        layer: indexes the cache.

    Returns:
        Queries [B, heads, F, head_dim].
    """
    assert view.cache is not None
    assert view.rows is not None
    batch, fed, _ = x.shape
    keys, values = view.cache.buffer[layer]
    query = x.new_empty(batch, fed, attention.heads, attention.head_dim)
    targets = (query, keys, values, view.rope, view.rows)
    if tile := _tile_for("project", x, attention.wqkv.weight):
        project_rows(x, norm, attention.wqkv.weight, *targets, tile, ready=view.relay.for_norm_of(x))
    else:
        rotate_many(F.linear(norm_many(x, norm)[1], attention.wqkv.weight), *targets)
    return query.transpose(1, 2)


def behind(
    x: Tensor,
    seen: Tensor,
    norm: RMSNorm,
    attention: Attention,
    feed_forward: SwiGLU,
    *,
    following: RMSNorm | None = None,
) -> tuple[Tensor, Handoff | None]:
    """Output projection of what the attention saw, residual sum and feed-forward layer.

    Args:
        x: [B, F, dim].
        seen: [B, F, heads * head_dim].
        norm: in front of the feed-forward layer.
        attention: whose output projection it is.
        feed_forward: the layer.
        following: the norm that comes next; None = it is not known.

    Returns:
        [B, F, dim] and, with few rows, what the following norm need not do.
    """
    out, gate, down = (
        _tile_for("wo", x, attention.wo.weight),
        _tile_for("gate", x, feed_forward.w1.weight),
        _tile_for("w2", x, feed_forward.w2.weight),
    )
    ready = None
    if out:
        x, ready = add_rows(seen, attention.wo.weight, x, out, following=norm if gate else None)
    elif gate:
        x = add_product(x, seen, attention.wo.weight)
    arrivals = _arrivals(feed_forward.w2.weight, down) if gate and down and down.splits > 1 else None
    if gate:
        hidden = gate_rows(x, norm, feed_forward.merged(), gate, clears=arrivals, ready=ready)
    else:
        x, normal = norm_many(x, norm, None if out else F.linear(seen, attention.wo.weight))
        hidden = gate_many(F.linear(normal, feed_forward.merged()))
    if down:
        return add_rows(hidden, feed_forward.w2.weight, x, down, arrivals=arrivals, following=following)
    # The sum behind the attention is nobody else's.
    return _added(x, hidden, feed_forward.w2.weight), None


def read(
    hidden: Sequence[Tensor],
    norms: Sequence[RMSNorm],
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    shares: Sequence[Tensor] | None,
) -> Tensor:
    """Logits [B, D, V] of the targets of a pass, the sum over heads of what each reads, in the dtype of x or float32.

    Args:
        hidden: per head, [B, F, dim].
        norms: per head.
        weights: per head, [V, dim].
        sources: per head, int64 [D], the slot read, -1 = none.
        shares: per head, float32 [D], weight of the read; None = one head reads all, by itself.
    """
    normals = [
        norm_gathered(x, norm, sources[head], None if shares is None else shares[head])
        for head, (x, norm) in enumerate(zip(hidden, norms, strict=True))
    ]
    total: Tensor | None = None
    for normal, weight in zip(normals, weights, strict=True):
        if tile := _tile_for("read", normal, weight):
            total = add_rows(normal, weight, total, tile, dtype=torch.float32)[0]
        else:
            total = F.linear(normal, weight) if total is None else _added(total, normal, weight)
    assert total is not None
    return total


def can_read(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`read` takes hidden states and matrices like these."""
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and x.dtype == weight.dtype
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and why_not(x.device) is None
    )


def _tile_for(product: Product, x: Tensor, weight: Tensor) -> Tile | None:
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
    ready = ready or _hand_off(x, norm)
    rows = x.shape[0] * x.shape[1]
    _launch(
        _kernels()[0].project_rows,
        (_ceil(len(weight), tile.columns),),
        x,
        (ready.scaled, ready.squares, weight, *_targets(query, keys, values, rope, cache_rows), norm.eps),
        tile,
        PARTIALS=len(ready.squares),
        **_heads(query, keys, rope),
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
        arrivals = _arrivals(weight, tile).zero_() if arrivals is None else arrivals
    # The kernel does not read or write what stands in for something.
    ready, handed = None, (out, out, out)
    if following is not None:
        ready = _empty_handoff(out, following, _ceil(len(weight), tile.columns))
        handed = (_scale(following, out), ready.scaled, ready.squares)
    _launch(
        _kernels()[0].add_rows,
        (_ceil(len(weight), tile.columns), tile.splits),
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


def _empty_handoff(x: Tensor, norm: RMSNorm, parts: int) -> Handoff:
    """Takes what is done of a norm of x, the sums of squares in so many parts; without a scale x is as good."""
    squares = torch.empty(parts, x.shape[0] * x.shape[1], dtype=torch.float32, device=x.device)
    return Handoff(x, x if norm.weight is None else torch.empty_like(x), squares)


def _hand_off(x: Tensor, norm: RMSNorm) -> Handoff:
    """What can be done of a norm in front of the product, in a kernel of its own."""
    x = x.contiguous()
    ready = _empty_handoff(x, norm, 1)
    _launch(
        _kernels()[1].hand_off_rows,
        (x.shape[0] * x.shape[1],),
        x,
        (x, _scale(norm, x), ready.scaled, ready.squares),
        K=x.shape[2],
        SCALED=norm.weight is not None,
        INNER=power_of_two(x.shape[2]),
    )
    return ready


def _arrivals(weight: Tensor, tile: Tile) -> Tensor:
    """A counter, not cleared, for every program along the columns of a product."""
    count = power_of_two(_ceil(len(weight), tile.columns))
    return torch.empty(count, dtype=torch.int32, device=weight.device)


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
    ready = ready or _hand_off(x, norm)
    rows, hidden = x.shape[0] * x.shape[1], len(weights) // 2
    out = x.new_empty(*x.shape[:2], hidden)
    _launch(
        _kernels()[0].gate_rows,
        (_ceil(hidden, tile.columns),),
        x,
        (ready.scaled, ready.squares, weights, out, out if clears is None else clears, rows, norm.eps),
        tile,
        CLEARED=0 if clears is None else len(clears),
        PARTIALS=len(ready.squares),
        **kernel_constants(weights[:hidden], tile, rows),
    )
    return out


def add_product(x: Tensor, seen: Tensor, weight: Tensor) -> Tensor:
    """Sum x + seen W^T by the vendor's library, [B, F, N]."""
    return torch.addmm(x.reshape(-1, x.shape[-1]), seen.reshape(-1, seen.shape[-1]), weight.t()).view(x.shape)


def _added(x: Tensor, seen: Tensor, weight: Tensor) -> Tensor:
    """The same in place."""
    x.view(-1, x.shape[-1]).addmm_(seen.view(-1, seen.shape[-1]), weight.t())
    return x


def norm_many(x: Tensor, norm: RMSNorm, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum x + delta (x itself without one) and its norm, [B, F, dim]."""
    x = x.contiguous()
    total = x if delta is None else torch.empty_like(x)
    normal = torch.empty_like(x)
    rows, dim = x.shape[0] * x.shape[1], x.shape[2]
    _launch(
        _kernels()[1].norm_many,
        (rows,),
        x,
        (x, x if delta is None else delta, _scale(norm, x), total, normal, rows, norm.eps),
        K=dim,
        ADD=delta is not None,
        SCALED=norm.weight is not None,
        ROWS=1,
        INNER=power_of_two(dim),
    )
    return total, normal


def norm_gathered(x: Tensor, norm: RMSNorm, sources: Tensor, shares: Tensor | None) -> Tensor:
    """Norms of the slots that targets are read from, times their shares; see :func:`read`, [B, D, dim]."""
    batch, fed, dim = x.shape
    out = x.new_empty(batch, len(sources), dim)
    _launch(
        _kernels()[1].norm_gathered,
        (batch * len(sources),),
        x,
        (x.contiguous(), _scale(norm, x), sources, x if shares is None else shares, out, fed, len(sources), norm.eps),
        K=dim,
        SCALED=norm.weight is not None,
        SHARED=shares is not None,
        INNER=power_of_two(dim),
    )
    return out


def rotate_many(
    projected: Tensor, query: Tensor, keys: Tensor, values: Tensor, rope: Tensor | None, cache_rows: Tensor
) -> None:
    """Rotate projections [B, F, (heads + 2 kv_heads) * head_dim]; the rest as in :func:`project_rows`."""
    rows, width = query.shape[0] * query.shape[1], projected.shape[-1]
    columns = min(1024, power_of_two(width))
    _launch(
        _kernels()[1].rotate_many,
        (rows, _ceil(width, columns)),
        query,
        (projected, *_targets(query, keys, values, rope, cache_rows)),
        **_heads(query, keys, rope),
        ROWS=1,
        COLUMNS=columns,
    )


def gate_many(both: Tensor) -> Tensor:
    """Product silu(a) b of the halves of [B, F, 2 * hidden]."""
    rows, hidden = both.shape[0] * both.shape[1], both.shape[2] // 2
    out = both.new_empty(*both.shape[:2], hidden)
    columns = min(1024, power_of_two(hidden))
    _launch(
        _kernels()[1].gate_many,
        (rows, _ceil(hidden, columns)),
        both,
        (both, out, rows),
        N=hidden,
        ROWS=1,
        COLUMNS=columns,
    )
    return out


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    x: Tensor,
    arguments: tuple[Any, ...],
    tile: Tile | None = None,
    **constants: Any,
) -> None:
    options: dict[str, Any] = {"num_warps": 4} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    options |= early_launch(x.device, tile is None or tile.early)
    # Triton launches on the current device.
    with torch.cuda.device_of(x):
        kernel[grid](*arguments, **constants, **options)


def _scale(norm: RMSNorm, x: Tensor) -> Tensor:
    # The kernel does not read what stands in for a scale.
    return x if norm.weight is None else norm.weight


def _targets(
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


def _heads(query: Tensor, keys: Tensor, rope: Tensor | None) -> dict[str, Any]:
    return {
        "HEADS": query.shape[2],
        "KV_HEADS": keys.shape[1],
        "HEAD_DIM": query.shape[3],
        "ROPE": rope is not None,
    }


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


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
