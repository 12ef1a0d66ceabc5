"""The transformer block."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vgen.layers.attention import Attention, View
from vgen.layers.cross_attention import CrossAttention
from vgen.layers.drop_path import DropPath
from vgen.layers.mlp import GeluMLP, SwiGLU
from vgen.layers.modulation import Modulation
from vgen.layers.norm import NormKind, make_norm


@dataclass(frozen=True)
class BlockShape:
    """What the blocks of a network have in common; see :class:`vgen.generators.transformer.Transformer`."""

    dim: int
    heads: int
    kv_heads: int
    ffn: Literal["swiglu", "gelu"]
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
    """

    def __init__(self, shape: BlockShape, *, drop_path: float, skip: bool = False) -> None:
        super().__init__()
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
            )
        self.modulation = Modulation(dim=dim, parts=6) if shape.modulated else None
        self.drop_path = DropPath(drop_path)
        self.skip = nn.Linear(2 * dim, dim) if skip else None
        self.post_norm = shape.norm_position == "post"

    def forward(self, x: Tensor, view: View, layer: int, skipped: Tensor | None = None) -> Tensor:
        """Map x [B, F, dim]; ``layer`` indexes the cache in the view, ``skipped`` is like x."""
        if self.skip is not None:
            assert skipped is not None
            x = self.skip(torch.cat([x, skipped], dim=-1))
        if self.post_norm:
            x = self.attention_norm(x + self.drop_path(self.attention(x, view, layer)))
            return self.ffn_norm(x + self.drop_path(self.feed_forward(x)))
        if self.modulation is None:
            x = x + self.drop_path(self.attention(self.attention_norm(x), view, layer))
            if self.cross_attention is not None and self.cross_norm is not None:
                x = x + self.drop_path(self.cross_attention(self.cross_norm(x), view, layer))
            return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))
        assert view.modulator is not None
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(view.modulator)
        seen = self.attention(self.attention_norm(x) * (1 + scale1) + shift1, view, layer)
        x = x + self.drop_path(gate1 * seen)
        return x + self.drop_path(gate2 * self.feed_forward(self.ffn_norm(x) * (1 + scale2) + shift2))
