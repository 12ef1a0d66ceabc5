"""The transformer block."""

from dataclasses import dataclass
from typing import Literal

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
    bias: bool
    qk_norm: NormKind | None
    modulated: bool
    attention_dropout: float
    residual_dropout: float
    ffn_dropout: float
    cross_attention: bool = False


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm x), then x + ffn(norm x), each modulated where conditioned.

    Where there is a context, x + cross-attention(norm x) stands between the two.

    Args:
        shape: sizes and switches.
        drop_path: stochastic depth of this block.
    """

    def __init__(self, shape: BlockShape, *, drop_path: float) -> None:
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
        mlp = SwiGLU if shape.ffn == "swiglu" else GeluMLP
        self.feed_forward = mlp(dim=dim, hidden=shape.ffn_hidden, dropout=shape.ffn_dropout, bias=shape.bias)
        self.modulation = Modulation(dim=dim, parts=6) if shape.modulated else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, view: View, layer: int) -> Tensor:
        """Map x [B, F, dim]; ``layer`` indexes the cache in the view."""
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
