"""Paths over a grid of rows and columns, one token after the other."""

from collections.abc import Callable

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.schedules.plan import Grid


def rows_first(height: int, width: int) -> Tensor:
    """Row by row, left to right."""
    return torch.arange(height * width)


def alternate(height: int, width: int) -> Tensor:
    """Row by row, every second row from right to left."""
    grid = torch.arange(height * width).view(height, width).clone()
    grid[1::2] = grid[1::2].flip(1)
    return grid.flatten()


def columns_first(height: int, width: int) -> Tensor:
    """Column by column, top to bottom."""
    return torch.arange(height * width).view(height, width).T.flatten()


def zigzag(height: int, width: int) -> Tensor:
    """Diagonals walked down and up in turn, first step to the right (the scan of JPEG and DAR)."""
    path: list[int] = []
    for diagonal in range(height + width - 1):
        rows = range(max(0, diagonal - width + 1), min(diagonal, height - 1) + 1)
        path += [row * width + diagonal - row for row in (reversed(rows) if diagonal % 2 == 0 else rows)]
    return torch.tensor(path)


def zigzag_down(height: int, width: int) -> Tensor:
    """Like :func:`zigzag`, first step down."""
    rows, columns = torch.div(zigzag(width, height), height, rounding_mode="floor"), zigzag(width, height) % height
    return columns * width + rows


def z_curve(height: int, width: int) -> Tensor:
    """Morton order: the bits of row and column interleaved; quarters, then quarters of quarters."""
    row, column = torch.arange(height)[:, None], torch.arange(width)[None, :]
    code = torch.zeros(height, width, dtype=torch.int64)
    for bit in range(max(height, width).bit_length()):
        code |= ((row >> bit & 1) << (2 * bit + 1)) | ((column >> bit & 1) << (2 * bit))
    return code.flatten().argsort()


def subsample(height: int, width: int) -> Tensor:
    """Four sub-grids of every second row and column, one after the other (even-even, even-odd, odd-even, odd-odd)."""
    grid = torch.arange(height * width).view(height, width)
    return torch.cat([grid[row::2, column::2].flatten() for row in (0, 1) for column in (0, 1)])


def spiral_in(height: int, width: int) -> Tensor:
    """Clockwise from the top left corner to the centre."""
    grid, path = torch.arange(height * width).view(height, width), []
    while grid.numel():
        path.append(grid[0])
        grid = grid[1:].T.flip(0)
    return torch.cat(path)


def spiral_out(height: int, width: int) -> Tensor:
    """The reverse of :func:`spiral_in`."""
    return spiral_in(height, width).flip(0)


SCANS: dict[str, Callable[[int, int], Tensor]] = {
    "raster": rows_first,
    "alternate": alternate,
    "column": columns_first,
    "zigzag": zigzag,
    "zigzag-down": zigzag_down,
    "z-curve": z_curve,
    "subsample": subsample,
    "spiral-in": spiral_in,
    "spiral-out": spiral_out,
}


def scan_order(name: str, grid: Grid, *, key: str) -> Tensor:
    """Raster position of every order index along a scan, int64 [N]; on (T, H, W) frame follows frame.

    Args:
        name: a key of ``SCANS``; on one axis there is only ``raster``.
        grid: token grid of one to three axes.
        key: configuration key to name in errors.

    Raises:
        UserError: for an unknown scan, or one that the grid has no rows and columns for.
    """
    if name not in SCANS:
        raise UserError(f"{key}={name} is unknown; choose one of {', '.join(SCANS)}")
    if len(grid) == 1:
        if name != "raster":
            raise UserError(f"{key}={name} walks over rows and columns; the grid {grid} has not both")
        return torch.arange(grid[0])
    height, width = grid[-2:]
    frames = grid[0] if len(grid) == 3 else 1
    path = SCANS[name](height, width)
    return (torch.arange(frames)[:, None] * len(path) + path).flatten()
