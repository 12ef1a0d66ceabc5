"""Attention from the slots of a generator to features beside the sequence."""

from torch import Tensor, nn

from vgen.layers.attention import View, attend
from vgen.layers.norm import NormKind, make_norm


class CrossAttention(nn.Module):
    """Queries from the slots, keys and values from the context; no rotary codes, since the context has no places.

    Args:
        dim: width of the residual stream and of the context.
        heads: number of heads; must divide dim.
        dropout: probability on the attention weights.
        residual_dropout: probability on the output.
        bias: biases on all projections.
        qk_norm: norm of every query and key over the head width; None = none.
        norm_eps: of that norm.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        dropout: float,
        residual_dropout: float,
        bias: bool = False,
        qk_norm: NormKind | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.dropout = dropout
        self.wq = nn.Linear(dim, dim, bias=bias)
        self.wkv = nn.Linear(dim, 2 * dim, bias=bias)
        self.q_norm = make_norm(qk_norm, self.head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = make_norm(qk_norm, self.head_dim, eps=norm_eps) if qk_norm else None
        self.wo = nn.Linear(dim, dim, bias=bias)
        self.residual_dropout = nn.Dropout(residual_dropout)

    def forward(self, x: Tensor, view: View, layer: int) -> Tensor:
        """Attend from x [B, F, dim] to the context of the view, or to the one written to its cache."""
        query = self._heads(self.wq(x))
        if self.q_norm is not None:
            query = self.q_norm(query).type_as(x)
        if view.context is not None:
            key, value = (self._heads(part) for part in self.wkv(view.context).chunk(2, dim=-1))
            if self.k_norm is not None:
                key = self.k_norm(key).type_as(value)
            if view.cache is not None:
                view.cache.write_context(layer, key, value)
        else:
            assert view.cache is not None
            key, value = view.cache.context(layer)
        dropout = self.dropout if self.training else 0.0
        out = attend(query, key, value, causal=False, mask=view.context_mask, dropout=dropout)
        return self.residual_dropout(self.wo(out.transpose(1, 2).flatten(2)))

    def _heads(self, projected: Tensor) -> Tensor:
        """[B, n, dim] to [B, heads, n, head_dim]."""
        return projected.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
