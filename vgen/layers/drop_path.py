"""Stochastic depth."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop the whole branch of a sample with a probability, scaling the survivors (arXiv 1603.09382)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Apply to a branch x [B, ...]; the identity in eval mode."""
        if not self.training or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        return x * torch.empty(shape, device=x.device, dtype=x.dtype).bernoulli_(keep).div_(keep)
