"""Finite scalar quantization (Mentzer et al., arXiv 2309.15505): a fixed grid of codes, no learned codebook."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vgen.errors import UserError


class FSQ(nn.Module):
    """Bounds every channel, rounds it to one of a few levels and numbers the combinations.

    Channels are the last axis, so the same module serves sequences, images and videos. It has no parameters and no keys
    in a state dict; all arithmetic is float32 whatever the autocast state.

    Args:
        levels: number of values L of each channel; the codebook has as many codes as their product.
        margin: by how much the bounds exceed the outermost levels, relative to their distance (1e-3 in the paper).

    Raises:
        UserError: for fewer than two levels in a channel.
    """

    def __init__(self, *, levels: Sequence[int], margin: float = 1e-3) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise UserError(f"FSQ levels={list(levels)} must list at least 2 levels per channel")
        self.levels = tuple(int(level) for level in levels)
        self.dim = len(self.levels)
        self.codebook_size = math.prod(self.levels)
        counts = torch.tensor(self.levels)
        half = (counts - 1).float() * (1 + margin) / 2
        offset = torch.where(counts % 2 == 0, 0.5, 0.0)
        basis = [math.prod(self.levels[:channel]) for channel in range(self.dim)]
        self.reach: Tensor
        self.offset: Tensor
        self.shift: Tensor
        self.basis: Tensor
        self.count: Tensor
        for name, value in (
            ("reach", half),
            ("offset", offset),
            ("shift", torch.atanh(offset / half)),
            ("basis", torch.tensor(basis)),
            ("count", counts),
        ):
            self.register_buffer(name, value, persistent=False)

    @property
    def codebook(self) -> Tensor:
        """All codes, float32 [codebook_size, dim]."""
        return self.codes(torch.arange(self.codebook_size, device=self.basis.device))

    def bound(self, z: Tensor) -> Tensor:
        """Squash z [..., dim] into the range of the levels, float32; rounding the result gives a level."""
        with torch.autocast(z.device.type, enabled=False):
            return torch.tanh(z.float() + self.shift) * self.reach - self.offset

    def ids(self, codes: Tensor) -> Tensor:
        """Codes [..., dim] to ids int64 [...]; the first channel varies fastest."""
        steps = (codes.float() * (self.count // 2)).round().long() + self.count // 2
        return (steps * self.basis).sum(-1)

    def codes(self, ids: Tensor) -> Tensor:
        """Ids int64 [...] to codes float32 [..., dim], each channel in [-1, 1]."""
        half = self.count // 2
        return (ids.unsqueeze(-1) // self.basis % self.count - half).float() / half

    def forward(self, z: Tensor, unrounded: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Quantize z [..., dim] of any floating dtype.

        Args:
            z: to be quantized.
            unrounded: bool [B], samples whose codes are only bounded, not rounded (a training aid).

        Returns:
            Codes float32 [..., dim] whose gradient is that of :meth:`bound` (straight-through rounding), and their ids
            int64 [...].
        """
        bounded = self.bound(z)
        with torch.autocast(z.device.type, enabled=False):
            rounded = bounded + (bounded.round() - bounded).detach()
            ids = self.ids(rounded.detach() / (self.count // 2))
            if unrounded is not None:
                rounded = torch.where(unrounded.view(-1, *[1] * (z.dim() - 1)), bounded, rounded)
            return rounded / (self.count // 2), ids
