"""Adaptive layer norm: scale, shift and gate computed from a conditioning vector (AdaLN-zero, arXiv 2212.09748)."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Modulator:
    """Conditioning vectors of the slots of one call.

    Where many slots share few vectors (one per direction of travel), the linear layers run on the few and ``index``
    spreads the result.

    Attributes:
        vectors: [B, K, dim].
        index: int64 [F] or [B, F], vector of each slot; None = K is the number of slots, or 1 for all alike.
    """

    vectors: Tensor
    index: Tensor | None = None

    def select(self, slots: Tensor) -> "Modulator":
        """The conditioning of some of the slots, int64 [n] or [B, n]."""
        if self.index is not None:
            if self.index.dim() == 2 and slots.dim() == 2:
                return Modulator(self.vectors, self.index.gather(1, slots))
            return Modulator(self.vectors, self.index[..., slots])
        if self.vectors.shape[1] == 1:
            return self
        if slots.dim() == 1:
            return Modulator(self.vectors[:, slots])
        vectors = self.vectors.expand(len(slots), -1, -1)
        return Modulator(vectors.gather(1, slots[..., None].expand(-1, -1, vectors.shape[-1])))

    def spread(self, values: Tensor) -> Tensor:
        """Values [B, K, ...] of the vectors brought to the slots, [B, F, ...]."""
        if self.index is None:
            return values
        if self.index.dim() == 1:
            return values[:, self.index]
        return values.gather(1, self.index[..., None].expand(-1, -1, values.shape[-1]))


class Modulation(nn.Module):
    """``parts`` tensors of the residual width from silu(conditioning); zero at first, so blocks start as identity.

    Args:
        dim: width of the residual stream and of the conditioning vector.
        parts: number of tensors.
    """

    def __init__(self, *, dim: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, parts * dim)
        self.parts = parts

    def forward(self, modulator: Modulator) -> tuple[Tensor, ...]:
        """Return ``parts`` tensors that broadcast to [B, F, dim]."""
        return modulator.spread(self.linear(F.silu(modulator.vectors))).chunk(self.parts, dim=-1)
