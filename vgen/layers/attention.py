"""Multi-head self-attention with rotary codes; the one attention call of the project."""

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vgen.layers.cache import KVCache
from vgen.layers.handoff import Relay
from vgen.layers.modulation import Modulator
from vgen.layers.norm import NormKind, make_norm
from vgen.layers.rope import rotate
from vgen.layers.rotation import split_and_rotate
from vgen.layers.short_attention import runs_here, short_attention


@dataclass(frozen=True)
class View:
    """What the slots of one call see, where their keys go, and what modulates their blocks.

    Attributes:
        causal: lower-triangular visibility without a mask tensor.
        mask: bool [F, P] or [B, 1, F, P], True = visible, or its :func:`additive_mask`; None = everything (or causal).
        blocks: block-sparse form of the mask, for FlexAttention; None = ``causal`` and ``mask`` decide.
        rope: float32 [F, head_dim / 2, 2] or [B, F, head_dim / 2, 2]; None = queries and keys are not rotated.
        modulator: conditioning of adaptive layer norms; None = the network has none.
        cache: cache to write to and attend over; None for teacher forcing.
        rows: int64 [F] or [B, F], cache rows of the slots.
        row_start: first row if they are consecutive, else -1.
        prefix: number of visible leading cache rows.
        settled: leading ones of these that earlier calls have written.
        context: [B, T, dim], features beside the sequence for cross-attention; None = the network has none, or their
            keys and values are in the cache.
        context_mask: bool [B, 1, 1, T], True = visible; None = the network has no context.
        relay: from block to block where kernels of :mod:`vgen.layers.fused` run both.
    """

    causal: bool
    mask: Tensor | None
    rope: Tensor | None
    modulator: Modulator | None = None
    cache: KVCache | None = None
    rows: Tensor | None = None
    row_start: int = -1
    prefix: int = 0
    settled: int = 0
    context: Tensor | None = None
    context_mask: Tensor | None = None
    blocks: BlockMask | None = None
    relay: Relay = field(default_factory=Relay)


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, mask: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention.

    Args:
        query: [B, heads, F, head_dim].
        key: [B, kv_heads, P, head_dim]; kv_heads divides heads (grouped-query attention, repeated in blocks).
        value: like key.
        causal: lower-triangular visibility (F = P).
        mask: broadcastable to [B, heads, F, P]; bool, True = visible, or float, added to the logits.
        dropout: probability on the attention weights.

    Returns:
        [B, heads, F, head_dim].
    """
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=grouped
    )


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask bool [..., P] as 0 and -inf, with rows aligned as kernels want them, so that no layer does it again."""
    columns = mask.shape[-1]
    rows = torch.zeros(*mask.shape[:-1], -(-columns // 16) * 16, dtype=dtype, device=mask.device)
    return rows[..., :columns].masked_fill_(~mask, float("-inf"))


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask) -> Tensor:
    """The same function under a block mask (FlexAttention, arXiv 2412.05496); shapes as in :func:`attend`.

    On a GPU the kernel is compiled; on the CPU it runs as plain tensor operations, for inference only.
    """
    call = _compiled_flex() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return call(query, key, value, block_mask=blocks, enable_gqa=query.shape[1] != key.shape[1])


@cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


class Attention(nn.Module):
    """Fused query-key-value projection, optional norms, rotary codes, attention, output projection.

    Args:
        dim: width of the residual stream.
        heads: number of query heads; must divide dim.
        kv_heads: number of key-value heads; must divide heads.
        dropout: probability on the attention weights.
        residual_dropout: probability on the output.
        bias: biases on both projections.
        qkv_bias: biases on the first projection; None = as ``bias``.
        qk_norm: norm of every query and key over the head width, shared by all heads; None = none.
        norm_eps: of that norm.
        output: has an output projection; without one :meth:`merge` cannot be used.

    Attributes:
        fused: few queries against a cache go through :func:`vgen.layers.short_attention.short_attention`; set by
            ``Transformer.fuse_decoding``.
        fused_rotation: with gradients, projections are cut and rotated by :mod:`vgen.layers.rotation`; set by
            ``Transformer.fuse_rotation``.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_heads: int,
        dropout: float,
        residual_dropout: float,
        bias: bool = False,
        qkv_bias: bool | None = None,
        qk_norm: NormKind | None = None,
        norm_eps: float = 1e-5,
        output: bool = True,
    ) -> None:
        super().__init__()
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.dropout = dropout
        self.fused = self.fused_rotation = False
        self.wqkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=qkv_bias)
        self.q_norm = make_norm(qk_norm, self.head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = make_norm(qk_norm, self.head_dim, eps=norm_eps) if qk_norm else None
        if output:
            self.wo = nn.Linear(dim, dim, bias=bias)
        self.residual_dropout = nn.Dropout(residual_dropout)

    def forward(self, x: Tensor, view: View, layer: int) -> Tensor:
        """Attend from x [B, F, dim]; ``layer`` indexes the cache."""
        return self.merge(self.look(*self.project(x, view.rope), view, layer))

    def project(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, F, head_dim] of x [B, F, dim]; ``rope`` as in :class:`View`."""
        batch, fed, _ = x.shape
        projected = self.wqkv(x)
        if self.fused_rotation and rope is not None and torch.is_grad_enabled():
            return split_and_rotate(projected, rope, self.heads, self.kv_heads)
        heads = projected.view(batch, fed, -1, self.head_dim)
        if torch.compiler.is_compiling():
            # Apart, and in the layout of the projection: the compiler then joins rotations and their gradients to the
            # kernels on either side, where joined queries and keys are copied once more.
            query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
            return self._placed(query, self.q_norm, rope), self._placed(key, self.k_norm, rope), value.transpose(1, 2)
        both, value = heads.transpose(1, 2).split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = both.split([self.heads, self.kv_heads], dim=1)
            both = torch.cat([self.q_norm(query).type_as(value), self.k_norm(key).type_as(value)], dim=1)
        if rope is not None:
            both = rotate(both, rope)
        query, key = both.split([self.heads, self.kv_heads], dim=1)
        return query, key, value

    @staticmethod
    def _placed(x: Tensor, norm: nn.Module | None, rope: Tensor | None) -> Tensor:
        """Queries or keys [B, F, heads, head_dim], normed and rotated, as [B, heads, F, head_dim]."""
        normal = x if norm is None else norm(x).type_as(x)
        return normal.transpose(1, 2) if rope is None else rotate(normal.transpose(1, 2), rope)

    def look(self, query: Tensor, key: Tensor | None, value: Tensor | None, view: View, layer: int) -> Tensor:
        """What the slots see, [B, F, heads * head_dim]; without keys and values those of the cache, already written."""
        if key is None or value is None:
            assert view.cache is not None
            key, value = view.cache.visible(layer, view.prefix)
        elif view.cache is not None:
            assert view.rows is not None
            key, value = view.cache.write(layer, key, value, view.rows, view.row_start, view.prefix)
        if self.fused and view.cache is not None and view.blocks is None and runs_here(query, key, view.mask):
            return short_attention(query, key, value, bias=view.mask, settled=view.settled)
        key, value = key.to(query.dtype), value.to(query.dtype)
        if view.blocks is not None:
            out = attend_blocks(query, key, value, view.blocks)
        else:
            dropout = self.dropout if self.training else 0.0
            out = attend(query, key, value, causal=view.causal, mask=view.mask, dropout=dropout)
        return out.transpose(1, 2).flatten(2)

    def merge(self, seen: Tensor) -> Tensor:
        """Output projection of what :meth:`look` returned, [B, F, dim]."""
        return self.residual_dropout(self.wo(seen))
