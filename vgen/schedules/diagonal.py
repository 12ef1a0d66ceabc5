"""Diagonal order: one token per pass along a zig-zag over the diagonals (DAR)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from vgen.errors import UserError
from vgen.schedules.plan import Plan, check_grid
from vgen.schedules.raster import raster


def diagonal(*, grid: Sequence[int], num_condition: int = 1, first: Literal["right", "down"] = "right") -> Plan:
    """Plan of the zig-zag diagonal scan (DAR, arXiv 2503.11129; which way it starts is not stated there).

    Diagonals row + column = 0, 1, .. are walked downwards and upwards in turn, so that consecutive tokens touch.
    Everything else is as in raster order. On T x H x W grids frame follows frame.

    Args:
        grid: token grid (H, W) or (T, H, W).
        num_condition: number of condition slots.
        first: the first step from the corner.

    Raises:
        UserError: for a grid without height and width, or an unknown first step.
    """
    sides = check_grid(grid, num_condition)
    if len(sides) not in (2, 3):
        raise UserError(f"schedule 'diagonal' walks over height and width; the grid {sides} has not both")
    if first not in ("right", "down"):
        raise UserError(f"schedule.first={first} must be right or down")
    height, width = sides[-2:]
    upwards = 0 if first == "right" else 1
    scan = []
    for diagonal_index in range(height + width - 1):
        rows = range(max(0, diagonal_index - width + 1), min(diagonal_index, height - 1) + 1)
        ordered = reversed(rows) if diagonal_index % 2 == upwards else rows
        scan += [row * width + diagonal_index - row for row in ordered]
    frames = sides[0] if len(sides) == 3 else 1
    order = (torch.arange(frames)[:, None] * len(scan) + torch.tensor(scan)).flatten()
    return replace(raster(grid=sides, num_condition=num_condition), name="diagonal", order=order)
