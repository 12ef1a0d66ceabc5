"""Rotary position codes on grids of any number of axes."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgen.errors import UserError

RopeKind = Literal["own", "own_target", "none"]
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
    pairs, share = head_dim // 2, axis_shares(len(grid), head_dim)
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


def extrapolated_rope_table(grid: tuple[int, ...], head_dim: int, *, factor: int, boundary: int) -> Tensor:
    """Rotary table of a grid ``factor`` times finer than the one a network was trained on (RandAR's public code).

    The ``boundary`` highest frequencies of every axis count cells of the fine grid, so that neighbours stay one step
    apart; the others are squeezed into the trained range, its ends included.

    Args:
        grid: trained token grid.
        head_dim: width of one attention head, even.
        factor: how many times finer, >= 1.
        boundary: number of frequencies that are not squeezed.

    Returns:
        float32 [N factor^axes + 1, head_dim / 2, 2], a zero row last.
    """
    fine = tuple(side * factor for side in grid)
    coordinates, angles = grid_coordinates(fine), []
    for axis, pairs in enumerate(axis_shares(len(grid), head_dim)):
        frequency = 10000.0 ** (-torch.arange(pairs).float() / pairs)
        squeezed = torch.linspace(0, grid[axis] - 1, fine[axis])[coordinates[:, axis], None]
        plain = coordinates[:, axis, None].float()
        angles.append(torch.where(torch.arange(pairs) < boundary, plain, squeezed) * frequency)
    turned = torch.cat(angles, dim=1)
    table = torch.stack([turned.cos(), turned.sin()], dim=-1)
    return torch.cat([table, torch.zeros(1, head_dim // 2, 2)])


def axis_shares(axes: int, head_dim: int) -> list[int]:
    """Pairs of each axis."""
    pairs = head_dim // 2
    return [pairs // axes + (1 if axis >= axes - pairs % axes else 0) for axis in range(axes)]


class Rotary(nn.Module):
    """Rotary rows of slots from the places of what they hold and of what they predict.

    With ``own_target`` (DAR's 4D code, arXiv 2503.11129) half of the head is rotated by the place a slot holds and half
    by the place it predicts, each as in :func:`rope_table`. The tables stay in float32 whatever the network's dtype.

    Args:
        kind: ``own``, ``own_target`` or ``none``.
        grid: token grid.
        head_dim: width of one attention head.
        base: frequency base.
        placeless: see :func:`rope_table`.
        axes: order of the coordinates within the head, numbers into (own axes, target axes); None = in that order.

    Raises:
        UserError: for a head width or an order of axes that does not fit.
    """

    table: Tensor
    pairs: Tensor | None

    def __init__(
        self,
        *,
        kind: RopeKind,
        grid: tuple[int, ...],
        head_dim: int,
        base: float,
        placeless: Placeless,
        axes: Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.kind = kind
        both = kind == "own_target"
        if both and head_dim % 4:
            raise UserError(f"generator.rope=own_target needs a head width divisible by 4, not {head_dim}")
        width = head_dim // 2 if both else head_dim
        table = torch.zeros(0) if kind == "none" else rope_table(grid, width, base=base, placeless=placeless)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("pairs", None, persistent=False)
        if axes is not None:
            if kind == "none":
                raise UserError("generator.rope_axes orders the coordinates of a rotary code; generator.rope is none")
            shares = axis_shares(len(grid), width) * (2 if both else 1)
            blocks = torch.arange(head_dim // 2).split(shares)
            if sorted(axes) != list(range(len(blocks))):
                raise UserError(
                    f"generator.rope_axes={list(axes)} must order the coordinates 0..{len(blocks) - 1}, each once"
                )
            self.pairs = torch.cat([blocks[axis] for axis in axes])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Rotary":
        # Follows the network to its device, but not to its dtype: bfloat16 angles are wrong far from the corner.
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return self

    def forward(self, own: Tensor, target: Tensor) -> Tensor | None:
        """Rows float32 [F, head_dim / 2, 2] or [B, F, ..] of slots.

        Args:
            own: int64 [F] or [B, F], raster position of what a slot holds, the number of tokens for none.
            target: likewise, of what it predicts.
        """
        if self.kind == "none":
            return None
        rows = self.table[own]
        if self.kind == "own_target":
            rows = torch.cat([rows, self.table[target]], dim=-2)
        return rows if self.pairs is None else rows[..., self.pairs, :]


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
    if not torch.compiler.is_compiling():
        # One complex product instead of several kernels.
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.view_as_complex(table)).flatten(-2).type_as(x)
    # For a compiler, which does not fuse complex numbers: every number and its neighbour, swapped by an index, so that
    # both directions read and write their tensor once.
    signs = 2.0 * torch.arange(2, device=x.device) - 1.0
    cos = table[..., :1].expand(*table.shape).flatten(-2)
    sin = (table[..., 1:] * signs).flatten(-2)
    wide = x.float()
    return (wide * cos + wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin).type_as(x)
