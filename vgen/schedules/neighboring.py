"""Neighboring order: all tokens at the next Manhattan distance from the first corner in one pass (NAR)."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch

from vgen.schedules.building import Step, check_grid, make_plan
from vgen.schedules.plan import Kind, Plan


def neighboring(*, grid: Sequence[int], num_condition: int = 1) -> Plan:
    """Plan of neighboring autoregressive modeling (NAR, arXiv 2503.10696, section 3).

    One output head per grid axis, the last axis first: head 0 of a token predicts its neighbour along the last axis
    (right), head 1 along the axis before (below), head 2 (back, in time). A token is predicted by the mean over the
    neighbours it has; the first token by the mean of all heads at the last condition slot. A token sees the condition
    and all tokens that are not farther from the corner than itself.

    Slots: the condition, then tokens by distance and in raster order within a distance, so that a pass sees a prefix of
    the cache. The last token is never fed. Passes: 1 + sum of (side - 1), 2 G - 1 on a G x G grid. On one axis this is
    the raster order.

    Args:
        grid: token grid of any number of axes.
        num_condition: number of condition slots.

    Raises:
        UserError: for an empty grid or no condition slot.
    """
    sides = check_grid(grid, num_condition)
    tokens, axes = prod(sides), len(sides)
    coordinates = torch.unravel_index(torch.arange(tokens), sides)
    distance = torch.stack(coordinates).sum(0)
    order = distance.argsort(stable=True)
    index = order.argsort()

    slots = torch.arange(num_condition + tokens - 1)
    token = slots - num_condition
    is_token = token >= 0
    level = torch.where(is_token, num_condition + distance[order[token.clamp(min=0)]], slots)
    target = torch.full_like(slots, -1)
    target[num_condition - 1] = 0
    reads = [torch.tensor([[num_condition - 1, head, 0] for head in range(axes)])]
    for axis in range(axes):
        reached = torch.nonzero(coordinates[axis] > 0).flatten()
        slot = num_condition + index[reached - prod(sides[axis + 1 :])]
        # The later axes overwrite the earlier ones: a slot's one "next" position is the right neighbour if it has one.
        target[slot] = index[reached]
        head = torch.full_like(slot, axes - 1 - axis)
        reads.append(torch.stack([slot, head, index[reached]], dim=1))

    steps, first = [Step(range(num_condition), [0])], 0
    for size, following in pairwise(torch.bincount(distance).tolist()):
        fed = range(num_condition + first, num_condition + first + size)
        first += size
        steps.append(Step(fed, range(first, first + following)))
    return make_plan(
        name="neighboring",
        grid=sides,
        num_condition=num_condition,
        order=order,
        kind=torch.where(is_token, Kind.TOKEN, Kind.CONDITION),
        source=torch.where(is_token, token, slots),
        position=torch.where(is_token, token, -1),
        target=target,
        level_q=level,
        level_k=level,
        reads=torch.cat(reads),
        steps=steps,
        num_heads=axes,
    )
