"""Normalisation layers."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NormKind = Literal["rms", "layer"]


class RMSNorm(nn.Module):
    """Normalise in float32, cast back, then scale (the order published Llama-family image models were trained with).

    Args:
        dim: size of the last axis.
        eps: added to the mean square.
        affine: learn a scale.
    """

    weight: nn.Parameter | None

    def __init__(self, dim: int, *, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., dim]; the output has the dtype of x times that of the weight."""
        normal = F.rms_norm(x, x.shape[-1:], None, self.eps).type_as(x)
        return normal if self.weight is None else normal * self.weight


def make_norm(kind: NormKind, dim: int, *, eps: float, affine: bool = True) -> nn.Module:
    """A root-mean-square norm, or a layer norm with bias."""
    if kind == "rms":
        return RMSNorm(dim, eps=eps, affine=affine)
    return nn.LayerNorm(dim, eps=eps, elementwise_affine=affine)
