"""Fixed sine-cosine positions."""

import torch
from torch import Tensor


def sincos_1d(dim: int, positions: Tensor, *, base: float = 10000.0) -> Tensor:
    """Sine-cosine table of positions [n], float64 [n, dim]: halves [sin | cos], frequencies base^(-k / (dim / 2))."""
    assert dim % 2 == 0
    frequencies = base ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_3d(dim: int, grid: tuple[int, int, int]) -> Tensor:
    """Table of a (T, H, W) grid in t, h, w order, float32 [T * H * W, dim].

    The sum of a time table and a table of the place in the frame, [column half | row half], both of full width.
    """
    time, row, column = (axis.flatten() for axis in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    place = torch.cat([sincos_1d(dim // 2, column), sincos_1d(dim // 2, row)], dim=1)
    return (place + sincos_1d(dim, time)).float()
