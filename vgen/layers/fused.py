"""A decoding pass of a Llama block in few kernels: all but its attention.

Few rows: a product with every weight is one kernel that streams the weight once and does what lies before and behind
it (vgen.layers.few_rows). Many rows: products by the vendor's library, what lies between them in one kernel each
(vgen.layers.many_rows).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgen.layers.attention import Attention, View
from vgen.layers.availability import why_not
from vgen.layers.few_rows import add_rows, arrivals_of, gate_rows, project_rows, tile_for
from vgen.layers.handoff import Handoff
from vgen.layers.many_rows import (
    add_product,
    add_product_in_place,
    embed_rows,
    gate_many,
    norm_gathered,
    norm_many,
    rotate_many,
)
from vgen.layers.mlp import SwiGLU
from vgen.layers.norm import RMSNorm
from vgen.layers.short_attention import reads_float8
from vgen.layers.tiles import FEW


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
    few = len(ids) * index.shape[-1] <= FEW
    return embed_rows(table, ids, index, following=following if few and isinstance(following, RMSNorm) else None)


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
    if tile := tile_for("project", x, attention.wqkv.weight):
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
        tile_for("wo", x, attention.wo.weight),
        tile_for("gate", x, feed_forward.w1.weight),
        tile_for("w2", x, feed_forward.w2.weight),
    )
    ready = None
    if out:
        x, ready = add_rows(seen, attention.wo.weight, x, out, following=norm if gate else None)
    elif gate:
        x = add_product(x, seen, attention.wo.weight)
    arrivals = arrivals_of(feed_forward.w2.weight, down) if gate and down and down.splits > 1 else None
    if gate:
        hidden = gate_rows(x, norm, feed_forward.merged(), gate, clears=arrivals, ready=ready)
    else:
        x, normal = norm_many(x, norm, None if out else F.linear(seen, attention.wo.weight))
        hidden = gate_many(F.linear(normal, feed_forward.merged()))
    if down:
        return add_rows(hidden, feed_forward.w2.weight, x, down, arrivals=arrivals, following=following)
    # The sum behind the attention is nobody else's.
    return add_product_in_place(x, hidden, feed_forward.w2.weight), None


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
        if tile := tile_for("read", normal, weight):
            total = add_rows(normal, weight, total, tile, dtype=torch.float32)[0]
        else:
            total = F.linear(normal, weight) if total is None else add_product_in_place(total, normal, weight)
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
