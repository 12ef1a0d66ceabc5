"""Diagonal order: one token per pass along a zig-zag over the diagonals (DAR)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from vgen.errors import UserError
from vgen.schedules.building import check_grid
from vgen.schedules.plan import Plan
from vgen.schedules.raster import raster
from vgen.schedules.scans import scan_order


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
    order = scan_order("zigzag" if first == "right" else "zigzag-down", sides, key="schedule.first")
    return replace(raster(grid=sides, num_condition=num_condition), name="diagonal", order=order)
