"""The transformer block."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vgen.layers import fused
from vgen.layers.attention import Attention, View
from vgen.layers.cross_attention import CrossAttention
from vgen.layers.drop_path import DropPath
from vgen.layers.mlp import GeluMLP, SwiGLU
from vgen.layers.modulation import Modulation
from vgen.layers.norm import NormKind, RMSNorm, make_norm

FeedForwardKind = Literal["swiglu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class BlockShape:
    """What the blocks of a network have in common; see :class:`vgen.generators.transformer.Transformer`."""

    dim: int
    heads: int
    kv_heads: int
    ffn: FeedForwardKind
    ffn_hidden: int
    norm: NormKind
    norm_eps: float
    norm_affine: bool
    norm_position: Literal["pre", "post"]
    bias: bool
    qkv_bias: bool | None
    qk_norm: NormKind | None
    modulated: bool
    attention_dropout: float
    residual_dropout: float
    ffn_dropout: float
    ffn_inner_dropout: float | None
    cross_attention: bool = False


class Block(nn.Module):
    """Transformer block, pre-norm: x + attention(norm x), then x + ffn(norm x), each modulated where conditioned.

    Post-norm (BERT, arXiv 1810.04805): norm(x + attention(x)), then norm(x + ffn(x)).

    Where there is a context, x + cross-attention(norm x) stands between the two.

    Args:
        shape: sizes and switches.
        drop_path: stochastic depth of this block.
        skip: the block first mixes in the output of an earlier one (long skips of U-ViT, arXiv 2209.12152).
        in_parts: another block calls the parts of this one.
    """

    def __init__(self, shape: BlockShape, *, drop_path: float, skip: bool = False, in_parts: bool = False) -> None:
        super().__init__()
        self.in_parts = in_parts
        dim, eps = shape.dim, shape.norm_eps
        self.attention_norm = make_norm(shape.norm, dim, eps=eps, affine=shape.norm_affine)
        self.attention = Attention(
            dim=dim,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            dropout=shape.attention_dropout,
            residual_dropout=shape.residual_dropout,
            bias=shape.bias,
            qkv_bias=shape.qkv_bias,
            qk_norm=shape.qk_norm,
            norm_eps=eps,
        )
        self.cross_norm = self.cross_attention = None
        if shape.cross_attention:
            self.cross_norm = make_norm(shape.norm, dim, eps=eps, affine=shape.norm_affine)
            self.cross_attention = CrossAttention(
                dim=dim,
                heads=shape.heads,
                dropout=shape.attention_dropout,
                residual_dropout=shape.residual_dropout,
                bias=shape.bias,
                qk_norm=shape.qk_norm,
                norm_eps=eps,
            )
        self.ffn_norm = make_norm(shape.norm, dim, eps=eps, affine=shape.norm_affine)
        self.feed_forward: SwiGLU | GeluMLP
        if shape.ffn == "swiglu":
            self.feed_forward = SwiGLU(dim=dim, hidden=shape.ffn_hidden, dropout=shape.ffn_dropout, bias=shape.bias)
        else:
            self.feed_forward = GeluMLP(
                dim=dim,
                hidden=shape.ffn_hidden,
                dropout=shape.ffn_dropout,
                bias=shape.bias,
                inner_dropout=shape.ffn_inner_dropout,
                approximate=shape.ffn == "gelu_tanh",
            )
        self.modulation = Modulation(dim=dim, parts=6) if shape.modulated else None
        self.drop_path = DropPath(drop_path)
        self.skip = nn.Linear(2 * dim, dim) if skip else None
        self.post_norm = shape.norm_position == "post"
        others = (self.cross_attention, self.modulation, self.skip)
        self.fusible = not self.post_norm and all(other is None for other in others)
        # In a tuple, for it is a module of another block.
        self._following: tuple[nn.Module, ...] = ()
        self.fusible &= fused.is_plain((self.attention_norm, self.ffn_norm), self.attention, self.feed_forward)

    def forward(self, x: Tensor, view: View, layer: int, skipped: Tensor | None = None) -> Tensor:
        """Map x [B, F, dim]; ``layer`` indexes the cache in the view, ``skipped`` is like x."""
        if self.skip is not None:
            assert skipped is not None
            x = self.skip(torch.cat([x, skipped], dim=-1))
        if self.post_norm:
            x = self.attention_norm(x + self.drop_path(self.attention(x, view, layer)))
            return self.ffn_norm(x + self.drop_path(self.feed_forward(x)))
        if self.attention.fused and self.fusible and fused.can_run(x, self.attention, view):
            return self._fused(x, view, layer)
        window = None
        if view.cache is not None and view.row_start >= 0:
            window = view.cache.window(layer, view.row_start, x.shape[1])
        changes: tuple[Tensor, ...] = ()
        if self.modulation is not None:
            assert view.modulator is not None
            changes = self.modulation(view.modulator)
        query, key, value = self.before(x, view.rope, changes[:2], window)
        seen = self.attention.look(query, key, value, view, layer)
        if self.cross_attention is not None and self.cross_norm is not None:
            x = x + self.drop_path(self.attention.merge(seen))
            x = x + self.drop_path(self.cross_attention(self.cross_norm(x), view, layer))
            return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))
        return self.behind(x, seen, changes[2:])

    def fuse(self, enabled: bool, following: "Block | None" = None) -> None:
        """Run decoding passes by the kernels of :mod:`vgen.layers.fused`, where those know this block, or not.

        They want two weights side by side, so these move once; what was recorded on them before must not run any more.

        Args:
            enabled: whether to.
            following: the block that takes what this one gives; None = not known.
        """
        self.attention.fused = enabled
        self._following = (following.attention_norm,) if following is not None and following.fusible else ()
        if enabled and self.fusible and isinstance(self.feed_forward, SwiGLU):
            self.feed_forward.merged()

    def _fused(self, x: Tensor, view: View, layer: int) -> Tensor:
        """The same in fewer kernels."""
        assert isinstance(self.attention_norm, RMSNorm)
        assert isinstance(self.ffn_norm, RMSNorm)
        assert isinstance(self.feed_forward, SwiGLU)
        query = fused.before(x, self.attention_norm, self.attention, view, layer)
        seen = self.attention.look(query, None, None, view, layer)
        following = self._following[0] if self._following else None
        assert following is None or isinstance(following, RMSNorm)
        out, view.relay.last = fused.behind(
            x, seen, self.ffn_norm, self.attention, self.feed_forward, following=following
        )
        return out

    def before(
        self, x: Tensor, rope: Tensor | None, changes: tuple[Tensor, ...], window: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Norm, projection and rotation.

        Args:
            x: [B, F, dim].
            rope: see :class:`vgen.layers.attention.View`.
            changes: shift and scale of the norm, or nothing.
            window: cache rows [2, B, heads, F, head_dim] that take keys and values; None = they are returned.

        Returns:
            Queries, keys and values [B, heads, F, head_dim], the last two None where they were written.
        """
        normal = self.attention_norm(x)
        if changes:
            normal = normal * (1 + changes[1]) + changes[0]
        query, key, value = self.attention.project(normal, rope)
        if window is None:
            return query, key, value
        window[0].copy_(key)
        window[1].copy_(value)
        return query, None, None

    def behind(self, x: Tensor, seen: Tensor, changes: tuple[Tensor, ...]) -> Tensor:
        """Output projection of what the attention saw, residual sum and feed-forward layer.

        Args:
            x: [B, F, dim].
            seen: [B, F, heads * head_dim].
            changes: gate of the attention, shift, scale and gate of the feed-forward layer, or nothing.
        """
        if not changes:
            x = x + self.drop_path(self.attention.merge(seen))
            return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))
        gate1, shift2, scale2, gate2 = changes
        x = x + self.drop_path(gate1 * self.attention.merge(seen))
        return x + self.drop_path(gate2 * self.feed_forward(self.ffn_norm(x) * (1 + scale2) + shift2))
