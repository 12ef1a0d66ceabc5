"""Tiles of the products of few rows: those worth timing, and the table of the best as a file.

The file is what ``benchmarks.kernels --choose`` writes and ``benchmarks.decode --tiles`` reads: JSON, per product a
list of ``[most rows, tile or null]``; null = by the vendor's library.
"""

import json
from dataclasses import asdict
from pathlib import Path

from vgen.errors import UserError
from vgen.layers.tiles import FEW, Product, Tile, Tiles, tiles_in_use

CLASSES = (4, 8, 16, 32, FEW)
"""Most rows of the classes that have tiles of their own."""


def class_of(rows: int) -> int:
    """The class of a number of rows up to ``FEW``."""
    return next(most for most in CLASSES if rows <= most)


def candidates(product: Product, rows: int) -> list[Tile]:
    """Tiles worth timing; made for inner axes of about 1,000 numbers and a w2 of three times that."""
    if rows <= 4:
        cuts = [(4, 512, 2), (4, 1024, 4), (8, 1024, 4), (8, 2048, 8)]
        return [Tile("by_row", columns, inner, warps) for columns, inner, warps in cuts]
    streamed = [
        Tile("streamed", 16, 64, 1, 5),
        Tile("streamed", 16, 128, 2, 4),
        Tile("streamed", 16, 128, 2, 5, early=False),
        Tile("streamed", 16, 256, 4, 3),
        Tile("streamed", 8, 128, 2, 5, turned=True),
    ]
    if rows <= 16:
        held = [Tile("held", 16, 256, 4, 4), Tile("held", 16, 256, 8, 4), Tile("held", 8, 256, 4, 4, turned=True)]
        held += [Tile("held", 16, 128, 4, 8), Tile("held", 16, 256, 2, 4 if rows <= 8 else 2)]
    else:
        held = [Tile("held", 16, 256, 4, 2), Tile("held", 16, 256, 8, 4), Tile("held", 16, 128, 4, 4)]
        streamed += [Tile("streamed", 32, 128, 4, 4), Tile("streamed", 32, 128, 4, 4, turned=True)]
    if rows > 32:
        held = [held[1], Tile("held", 16, 128, 8, 4)]
        streamed += [Tile("streamed", 64, 64, 4, 5, turned=True), Tile("streamed", 16, 128, 4, 5)]
        streamed += [Tile("streamed", 16, 128, 4, 4, turned=True), Tile("streamed", 32, 64, 4, 6, turned=True)]
    if product == "w2":
        # Long rows: a program that holds them needs the registers of 8 warps.
        held = [Tile("held", 16, 256, 8, 2), Tile("held", 8, 256, 4, 2, turned=True), Tile("held", 16, 128, 8, 4)]
        held += [Tile("held", 8, 256, 8, 4, turned=True)]
    if product in ("wo", "w2"):
        streamed += [Tile("streamed", 8, 256, 4, 4, turned=True), Tile("streamed", 16, 256, 2, 4)]
    return held + streamed


def write_tiles(path: str | Path, chosen: Tiles) -> None:
    """Write a table of some classes."""
    table = {
        product: [[most, None if tile is None else asdict(tile)] for most, tile in entries]
        for product, entries in chosen.items()
    }
    Path(path).write_text(json.dumps(table, indent=1) + "\n")


def read_tiles(path: str | Path) -> Tiles:
    """The table in use with the classes of a file in place of its own.

    Raises:
        UserError: if the file is no such table.
    """
    try:
        given = json.loads(Path(path).read_text())
        table = {}
        for product, entries in tiles_in_use().items():
            own = {int(most): None if tile is None else Tile(**tile) for most, tile in given.get(product, [])}
            table[product] = tuple(sorted((dict(entries) | own).items()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a table of tiles as benchmarks.kernels --choose writes it: {error}") from error
    return table
