"""How the products of few rows are cut into programs: the one table, and what a long row makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

FEW = 64
"""Most rows (samples times slots) whose products can be our own kernels."""
_HELD_BYTES = 512  # of weights in the registers of a thread, by rows
_MOST_WARPS = 8
_MOST_PARTS = 8
_NARROWEST = 16
_MOST_FILLED = 7 / 6  # numbers of a row with those that fill its last step up, by numbers
_WIDE = 128  # numbers of a step that stays as wide however little of the last one is left

Product = Literal["project", "wo", "gate", "w2", "read"]
Kind = Literal["by_row", "held", "streamed"]


@dataclass(frozen=True)
class Tile:
    """How a product of few rows is cut; the kinds are explained in vgen/layers/few_row_kernels.py.

    Attributes:
        kind: by rows of numbers with the weight in registers, or by matrix products with the weight held in shared
            memory or streamed.
        columns: of the product per program, each a row of the weight, or of both that are gated.
        inner: numbers of a row that a program takes at a time.
        warps: warps per program.
        stages: tiles in flight, of the weight if streamed, of x if held.
        parts: into which a row is cut, side by side in one matrix product; 64 rows of weights in all
            parts fit Hopper's units.
        splits: programs that share the inner axis of w2, by matrix products; the last to arrive adds up what all have.
        early: launched before the kernel in front has ended (programmatic dependent launch).
    """

    kind: Kind
    columns: int
    inner: int
    warps: int
    stages: int = 1
    parts: int = 1
    splits: int = 1
    early: bool = True

    def __post_init__(self) -> None:
        if self.splits > 1 and self.kind == "by_row":
            raise ValueError("products by rows are not shared among programs; choose splits=1")


Tiles = Mapping[Product, Sequence[tuple[int, Tile | None]]]
"""Per product: most rows and the tile; None = by the vendor's library, as with many rows."""

MEASURED: Tiles = {
    "project": (
        (2, Tile("held", 32, 256, 4, 8, parts=2)),
        (4, Tile("held", 32, 256, 4, 8, parts=2)),
        (8, Tile("held", 32, 128, 4, 8, parts=2)),
        (16, Tile("held", 64, 512, 4, 8)),
        (32, Tile("held", 64, 1024, 4, 8)),
        (FEW, None),
    ),
    "wo": (
        (2, Tile("held", 32, 256, 4, 8, parts=2)),
        (4, Tile("held", 32, 256, 4, 8, parts=2)),
        (8, Tile("held", 32, 256, 4, 8, parts=2)),
        (16, Tile("held", 64, 256, 4, 8)),
        (32, Tile("held", 64, 1024, 4, 8)),
        (FEW, None),
    ),
    "gate": (
        (2, Tile("held", 16, 512, 4, 8, parts=2)),
        (4, Tile("held", 16, 512, 4, 8, parts=2)),
        (8, Tile("held", 16, 512, 4, 8, parts=2)),
        (16, Tile("held", 32, 1024, 4, 8)),
        (32, Tile("held", 32, 256, 4, 8)),
        (FEW, None),
    ),
    "w2": (
        (2, Tile("held", 16, 256, 4, 8, parts=4)),
        (4, Tile("held", 16, 256, 4, 8, parts=4)),
        (8, Tile("held", 16, 256, 4, 8, parts=4)),
        (16, Tile("held", 16, 256, 4, 8, parts=4)),
        (32, Tile("held", 64, 256, 4, 8, splits=4)),
        (FEW, None),
    ),
    "read": (
        (2, Tile("by_row", 4, 1024, 4)),
        (4, Tile("held", 32, 128, 4, 8, parts=2)),
        (8, Tile("held", 32, 128, 4, 8, parts=2)),
        (16, Tile("streamed", 64, 128, 4, 4)),
        (32, Tile("streamed", 64, 128, 4, 4)),
        (FEW, None),
    ),
}
"""At size L (benchmarks/RESULTS.md); above 32 rows the library is as fast or was not timed against."""
_LONGEST: Mapping[Product, int] = {"project": 1024, "wo": 1024, "gate": 1024, "w2": 2816, "read": 1024}
"""Inner axes of size L; for longer ones there is another table."""
# Measured at size XL, 2 rows only.
_LONG: Tiles = {
    **MEASURED,
    "project": ((2, Tile("held", 32, 128, 4, 8, parts=2)), *MEASURED["project"][1:]),
    "wo": ((2, Tile("held", 32, 128, 4, 8, parts=2)), *MEASURED["wo"][1:]),
    "gate": ((2, Tile("held", 16, 128, 4, 8, parts=2)), *MEASURED["gate"][1:]),
    "w2": ((2, Tile("by_row", 8, 1024, 4)), *MEASURED["w2"][1:]),
    "read": ((2, Tile("by_row", 4, 512, 2)), *MEASURED["read"][1:]),
}
_given: Tiles | None = None


def tiles_for(product: Product, width: int) -> Sequence[tuple[int, Tile | None]]:
    """Classes of a product whose inner axis is ``width`` long, as measured or as given to :func:`use_tiles`."""
    if _given is not None:
        return _given[product]
    return (MEASURED if width <= _LONGEST[product] else _LONG)[product]


def use_tiles(tiles: Tiles | None) -> None:
    """Use another table, e.g. what ``benchmarks.kernels --choose`` found, for inner axes of all lengths.

    Args:
        tiles: all products; None = what was measured. Recorded graphs keep their tiles.
    """
    global _given
    _given = tiles


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
    tile = next((tile for most, tile in tiles_for(product, width) if rows <= most), None)
    if tile is None:
        return None
    while width % tile.splits:
        tile = replace(tile, splits=tile.splits // 2)
    width //= tile.splits
    while width % tile.parts:
        tile = replace(tile, parts=tile.parts // 2)
    if tile.kind == "by_row":
        while tile.warps < _MOST_WARPS and _weight_bytes(product, tile, width) > _HELD_BYTES * tile.warps * 32:
            tile = replace(tile, warps=2 * tile.warps)
    elif tile.kind == "held":
        tile = _held_tile(product, tile, rows, width, shared_bytes)
    return replace(tile, inner=min(tile.inner, max(_NARROWEST, power_of_two(width // tile.parts))))


def _weight_bytes(product: Product, tile: Tile, width: int) -> int:
    """Bytes of weights that a program holds; a part of a row is filled up to whole tiles."""
    lines = tile.columns * (2 if product == "gate" else 1)
    return lines * tile.parts * -(-width // (tile.parts * tile.inner)) * tile.inner * 2


def _held_tile(product: Product, tile: Tile, rows: int, width: int, shared_bytes: int) -> Tile:
    """The first that a program can hold: the tile with fewer steps in flight, narrower steps, fewer columns."""
    columns, parts = tile.columns, tile.parts
    while parts <= _MOST_PARTS and width % parts == 0:
        inner = min(tile.inner, max(_NARROWEST, power_of_two(width // parts)))
        while inner > _WIDE and -(-width // (parts * inner)) * parts * inner > _MOST_FILLED * width:
            inner //= 2
        while inner >= _NARROWEST:
            numbers = parts * max(8, power_of_two(rows)) * inner
            held = replace(tile, columns=columns, parts=parts, inner=inner)
            room = (shared_bytes - _weight_bytes(product, held, width)) // (2 * numbers)
            # The compiler keeps one step more than those in flight, unless these are all.
            flying = room if room * parts * inner >= width else room - 1
            if flying > 0:
                return replace(held, stages=min(tile.stages, flying))
            inner //= 2
        columns, parts = columns // 2, 2 * parts
    return Tile("streamed", 16, 128, 2, 4, early=tile.early)


def power_of_two(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def ceil_division(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)
