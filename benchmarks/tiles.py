"""Tiles of the products of few rows: those worth timing, and the table of the best as a file.

The file is what ``benchmarks.kernels --choose`` writes and ``benchmarks.decode --tiles`` reads: JSON, per product a
list of ``[most rows, tile or null]``; null = by the vendor's library.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

from vgen.errors import UserError
from vgen.layers.mlp import swiglu_width
from vgen.layers.tiles import FEW, MEASURED, Product, Tile, Tiles, tiles_for

CLASSES = (2, 4, 8, 16, 32, FEW)
"""Most rows of the classes that have tiles of their own."""


def class_of(rows: int) -> int:
    """The class of a number of rows up to ``FEW``."""
    return next(most for most in CLASSES if rows <= most)


def candidates(product: Product, rows: int) -> list[Tile]:
    """Tiles worth timing; made for inner axes of about 1,000 numbers and a w2 of three times that."""
    tiles = []
    if rows <= 4:
        cuts = [(4, 512, 2), (4, 1024, 4), (8, 1024, 4), (8, 2048, 8)]
        tiles = [Tile("by_row", columns, inner, warps) for columns, inner, warps in cuts]
    held = [(16, 128, 4, 4, 1), (16, 256, 4, 4, 1), (32, 128, 4, 2, 1), (32, 256, 4, 2, 1), (32, 512, 4, 2, 1)]
    held += [(64, 256, 4, 1, 1), (64, 512, 4, 1, 1), (32, 128, 8, 4, 1), (8, 128, 4, 8, 1), (16, 128, 8, 8, 1)]
    if rows > 8:
        held += [(64, 128, 4, 1, 1), (64, 1024, 4, 1, 1), (64, 128, 8, 2, 1)]
    if product == "w2" and rows > 2:
        held += [(64, 128, 4, 1, 4), (64, 256, 4, 1, 4), (64, 64, 4, 1, 4), (32, 128, 4, 2, 4), (32, 256, 4, 2, 4)]
        held += [(64, 128, 4, 1, 8), (32, 128, 4, 2, 2), (32, 128, 8, 4, 2), (16, 128, 4, 4, 2)]
    # As many tiles of x in flight as there is room for.
    tiles += [Tile("held", c, inner, warps, 8, parts=parts, splits=splits) for c, inner, warps, parts, splits in held]
    # Fewer leave room for a neighbour.
    tiles += [Tile("held", 32, 128, 4, 2, parts=2), Tile("held", 16, 256, 4, 1, parts=4)]
    tiles += [Tile("streamed", 16, 128, 2, 4), Tile("streamed", 16, 128, 2, 5, early=False)]
    if product != "gate":
        return tiles
    # A column of the gated product takes two rows of weights.
    return [tile if tile.kind == "by_row" else replace(tile, columns=tile.columns // 2) for tile in tiles]


def write_tiles(path: str | Path, chosen: Tiles) -> None:
    """Write a table of some classes."""
    table = {
        product: [[most, None if tile is None else asdict(tile)] for most, tile in entries]
        for product, entries in chosen.items()
    }
    Path(path).write_text(json.dumps(table, indent=1) + "\n")


def read_tiles(path: str | Path, dim: int) -> Tiles:
    """The measured table of networks of a width with the classes of a file in place of its own.

    Raises:
        UserError: if the file is no such table.
    """
    try:
        given = json.loads(Path(path).read_text())
        table = {}
        for product in MEASURED:
            entries = tiles_for(product, swiglu_width(dim) if product == "w2" else dim)
            own = {int(most): None if tile is None else Tile(**tile) for most, tile in given.get(product, [])}
            table[product] = tuple(sorted((dict(entries) | own).items()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a table of tiles as benchmarks.kernels --choose writes it: {error}") from error
    return table
