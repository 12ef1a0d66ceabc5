"""Rotary position codes on grids of any number of axes."""

from math import prod
from typing import Literal

import torch
from torch import Tensor

Placeless = Literal["zero", "identity"]


def grid_coordinates(grid: tuple[int, ...]) -> Tensor:
    """Coordinates of every raster position, int64 [N, number of axes]."""
    axes = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=1)


def rope_table(grid: tuple[int, ...], head_dim: int, *, base: float = 10000.0, placeless: Placeless = "zero") -> Tensor:
    """Cosine and sine of every raster position, plus a last row for slots without a place.

    The head_dim / 2 pairs (2m, 2m + 1) are shared out over the axes in order, an uneven rest going to the last axes;
    pair k of an axis with p pairs has frequency base^(-k / p). On two axes this is the table of LlamaGen
    (arXiv 2406.06525) and its descendants NAR, PAR, ZipAR and RandAR.

    Args:
        grid: token grid.
        head_dim: width of one attention head, even.
        base: frequency base.
        placeless: last row: ``zero`` has cos = sin = 0, so that query and key of a condition slot vanish (all published
            LlamaGen-family weights were trained that way); ``identity`` leaves them unrotated.

    Returns:
        float32 [N + 1, head_dim / 2, 2].
    """
    assert head_dim % 2 == 0, "rotary codes need an even head width"
    pairs, axes = head_dim // 2, len(grid)
    share = [pairs // axes + (1 if axis >= axes - pairs % axes else 0) for axis in range(axes)]
    coordinates = grid_coordinates(grid).float()
    angles = torch.cat(
        [coordinates[:, a, None] * base ** (-torch.arange(p).float() / p) for a, p in enumerate(share) if p], dim=1
    )
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    last = torch.zeros(1, pairs, 2)
    if placeless == "identity":
        last[..., 0] = 1.0
    assert table.shape == (prod(grid), pairs, 2)
    return torch.cat([table, last])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate interleaved pairs: (a, b) -> (a cos - b sin, b cos + a sin), in float32.

    Args:
        x: [B, heads, F, head_dim].
        table: float32 [F, head_dim / 2, 2] or [B, F, head_dim / 2, 2].

    Returns:
        Tensor of the shape and dtype of x.
    """
    if table.dim() == 4:
        table = table.unsqueeze(1)
    pairs = x.float().unflatten(-1, (-1, 2))
    a, b = pairs.unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)
