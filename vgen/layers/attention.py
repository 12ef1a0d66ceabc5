"""Multi-head self-attention with rotary codes; the one attention call of the project."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from vgen.layers.cache import KVCache
from vgen.layers.modulation import Modulator
from vgen.layers.norm import NormKind, make_norm
from vgen.layers.rope import rotate


@dataclass(frozen=True)
class View:
    """What the slots of one call see, where their keys go, and what modulates their blocks.

    Attributes:
        causal: lower-triangular visibility without a mask tensor.
        mask: bool [F, P] or [B, 1, F, P], True = visible; None = everything (or causal).
        rope: float32 [F, head_dim / 2, 2] or [B, F, head_dim / 2, 2]; None = queries and keys are not rotated.
        modulator: conditioning of adaptive layer norms; None = the network has none.
        cache: cache to write to and attend over; None for teacher forcing.
        rows: int64 [F] or [B, F], cache rows of the slots.
        row_start: first row if they are consecutive, else -1.
        prefix: number of visible leading cache rows.
    """

    causal: bool
    mask: Tensor | None
    rope: Tensor | None
    modulator: Modulator | None = None
    cache: KVCache | None = None
    rows: Tensor | None = None
    row_start: int = -1
    prefix: int = 0


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


class Attention(nn.Module):
    """Fused query-key-value projection, optional norms, rotary codes, attention, output projection.

    Args:
        dim: width of the residual stream.
        heads: number of query heads; must divide dim.
        kv_heads: number of key-value heads; must divide heads.
        dropout: probability on the attention weights.
        residual_dropout: probability on the output.
        bias: biases on both projections.
        qk_norm: norm of every query and key over the head width, shared by all heads; None = none.
        norm_eps: of that norm.
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
        qk_norm: NormKind | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.dropout = dropout
        self.wqkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.q_norm = make_norm(qk_norm, self.head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = make_norm(qk_norm, self.head_dim, eps=norm_eps) if qk_norm else None
        self.wo = nn.Linear(dim, dim, bias=bias)
        self.residual_dropout = nn.Dropout(residual_dropout)

    def forward(self, x: Tensor, view: View, layer: int) -> Tensor:
        """Attend from x [B, F, dim]; ``layer`` indexes the cache."""
        batch, fed, _ = x.shape
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        query, key, value = (
            part.view(batch, fed, -1, self.head_dim).transpose(1, 2) for part in self.wqkv(x).split(sizes, dim=-1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query).type_as(value), self.k_norm(key).type_as(value)
        if view.rope is not None:
            query, key = rotate(query, view.rope), rotate(key, view.rope)
        if view.cache is not None:
            assert view.rows is not None
            key, value = view.cache.write(layer, key, value, view.rows, view.row_start, view.prefix)
        dropout = self.dropout if self.training else 0.0
        out = attend(query, key, value, causal=view.causal, mask=view.mask, dropout=dropout)
        return self.residual_dropout(self.wo(out.transpose(1, 2).reshape(batch, fed, -1)))
