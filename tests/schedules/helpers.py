"""Every order under configs/schedule on many grids, found by looking, not by name."""

import random
from math import prod

import torch

from vgen.errors import UserError
from vgen.schedules.catalog import available, load_plan

ORDERS = sorted(available())
GRIDS = [(1,), (7,), (1, 1), (1, 6), (5, 1), (4, 4), (3, 5), (4, 6), (6, 4), (2, 10), (2, 3, 4), (3, 4, 2), (2, 4, 4)]


def random_grids(count, *, seed=0, tokens=160):
    """Grids of one to three axes, of limited size."""
    draw, grids = random.Random(seed), []
    while len(grids) < count:
        grid = tuple(draw.randint(1, 14) for _ in range(draw.choice([1, 2, 2, 3])))
        if prod(grid) <= tokens:
            grids.append(grid)
    return grids


def plans(name, grids=GRIDS, **options):
    """Plans of an order on the grids it accepts."""
    found = []
    for grid in grids:
        try:
            found.append(load_plan(name, grid, options))
        except UserError:
            continue
    return found


def same_plan(one, other):
    """Whether two plans feed, see and decide the same."""
    names = ("order", "kind", "source", "position", "target", "level_q", "level_k", "reads")
    if not all(torch.equal(getattr(one, name), getattr(other, name)) for name in names):
        return False
    if (one.num_heads, one.num_learned, one.num_rows, one.exact) != (
        other.num_heads,
        other.num_learned,
        other.num_rows,
        other.exact,
    ):
        return False
    return len(one.forwards) == len(other.forwards) and all(
        torch.equal(a.slots, b.slots)
        and torch.equal(a.rows, b.rows)
        and torch.equal(a.targets, b.targets)
        and torch.equal(a.feed.tokens, b.feed.tokens)
        and a.prefix == b.prefix
        and ((a.mask is None and b.mask is None) or torch.equal(a.mask, b.mask))
        for a, b in zip(one.forwards, other.forwards, strict=True)
    )
