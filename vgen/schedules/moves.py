"""The moves an order makes: from the place of a slot to the place it predicts."""

import torch

from vgen.schedules.plan import Plan

# The four moves of the zig-zag scan in the order DAR's sheet numbers them: right, down, down-left, up-right.
FIRST = [(0, 1), (1, 0), (1, -1), (-1, 1)]


def moves_of(plan: Plan) -> list[tuple[int, ...]]:
    """Differences of coordinates that occur in a plan's own order, those of ``FIRST`` in front, then as they appear."""
    coordinates = torch.stack(torch.unravel_index(torch.arange(plan.num_tokens), plan.grid), dim=1)
    both = (plan.position >= 0) & (plan.target >= 0)
    start, end = plan.order[plan.position[both]], plan.order[plan.target[both]]
    found = dict.fromkeys(tuple(move) for move in (coordinates[end] - coordinates[start]).tolist())
    padding = (0,) * (len(plan.grid) - 2)
    first = [padding + move for move in FIRST]
    return [move for move in first if move in found] + [move for move in found if move not in first]
