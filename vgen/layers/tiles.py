"""How the products of few rows are cut into programs: the one table, and what a long row makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

FEW = 64
"""Most rows (samples times slots) whose products can be our own kernels."""
_HELD_BYTES = 512  # of weights in the registers of a thread
_MOST_WARPS = 8

Product = Literal["project", "wo", "gate", "w2", "read"]
Kind = Literal["by_row", "held", "streamed"]


@dataclass(frozen=True)
class Tile:
    """How a product of few rows is cut; the kinds are explained in vgen/layers/few_row_kernels.py.

    Attributes:
        kind: by rows of numbers, or by matrix products with the weight held in registers or streamed.
        columns: of the product per program, each a row of the weight, or of both that are gated.
        inner: numbers of a row that a program takes at a time.
        warps: warps per program.
        stages: tiles in flight, of the weight if streamed, of x if held.
        parts: into which a row is cut, side by side in one matrix product; 64 rows of weights in all
            parts fit Hopper's units.
        early: launched before the kernel in front has ended (programmatic dependent launch).
    """

    kind: Kind
    columns: int
    inner: int
    warps: int
    stages: int = 1
    parts: int = 1
    early: bool = True


Tiles = Mapping[Product, Sequence[tuple[int, Tile | None]]]
"""Per product: most rows and the tile; None = by the vendor's library, as with many rows."""

# Measured at size L (benchmarks/RESULTS.md); above 32 rows the library is as fast or was not timed against.
_tiles: Tiles = {
    "project": (
        (2, Tile("by_row", 4, 512, 2)),
        (4, Tile("held", 64, 128, 4, 2)),
        (8, Tile("held", 64, 128, 4, 2)),
        (16, Tile("held", 16, 256, 4, 1, parts=4)),
        (32, Tile("held", 64, 128, 4, 1)),
        (FEW, None),
    ),
    "wo": (
        (2, Tile("by_row", 4, 1024, 4)),
        (4, Tile("held", 32, 128, 4, 2, parts=2)),
        (8, Tile("held", 16, 256, 4, 1, parts=4)),
        (16, Tile("held", 8, 128, 4, 1, parts=8)),
        (32, Tile("held", 16, 256, 4, 1, parts=4)),
        (FEW, None),
    ),
    "gate": (
        (2, Tile("by_row", 4, 512, 2)),
        (4, Tile("held", 16, 128, 4, 2, parts=2)),
        (8, Tile("held", 16, 128, 4, 2, parts=2)),
        (16, Tile("held", 8, 256, 4, 1, parts=4)),
        (32, Tile("held", 32, 128, 4, 1)),
        (FEW, None),
    ),
    "w2": (
        (2, Tile("by_row", 8, 1024, 4)),
        (4, Tile("held", 8, 128, 4, 2, parts=8)),
        (8, Tile("held", 16, 256, 4, 1, parts=4)),
        (16, Tile("held", 8, 128, 4, 2, parts=8)),
        (32, Tile("held", 16, 256, 4, 1, parts=4)),
        (FEW, None),
    ),
    "read": (
        (2, Tile("by_row", 4, 512, 2)),
        (4, Tile("by_row", 4, 512, 2)),
        (8, None),
        (16, None),
        (32, None),
        (FEW, None),
    ),
}


def tiles_in_use() -> Tiles:
    """The table that :func:`best_tile` reads."""
    return _tiles


def use_tiles(tiles: Tiles) -> None:
    """Replace the table, e.g. by what ``benchmarks.kernels --choose`` found; recorded graphs keep their tiles."""
    global _tiles
    _tiles = tiles


def best_tile(product: Product, rows: int, width: int, shared_bytes: int = 232448) -> Tile | None:
    """The tile for a product.

    Args:
        product: which.
        rows: samples times slots.
        width: length of the inner axis.
        shared_bytes: shared memory that a program can have, by default that of an H100.

    Returns:
        None = by the vendor's library.
    """
    tile = next((tile for most, tile in _tiles[product] if rows <= most), None)
    if tile is None:
        return None
    warps, parts = tile.warps, tile.parts
    while width % parts:
        parts //= 2
    if tile.kind != "streamed":
        # Registers bound what a thread can hold of long rows, shared memory what a program can.
        held = tile.columns * width * (4 if product == "gate" else 2)
        flying = (tile.stages + 1) * parts * max(16, power_of_two(rows)) * tile.inner * 2
        while warps < _MOST_WARPS and held > _HELD_BYTES * warps * 32:
            warps *= 2
        too_much = held > _HELD_BYTES * warps * 32
        if tile.kind == "held" and (too_much or held + flying > shared_bytes):
            tile, warps, parts = Tile("streamed", 16, 128, 2, 4, early=tile.early), 2, 1
    inner = min(tile.inner, max(16, power_of_two(width // parts)))
    return replace(tile, warps=warps, parts=parts, inner=inner)


def power_of_two(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
