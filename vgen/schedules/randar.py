"""RandAR order: tokens asked for by position, in random order, several per pass without retraining."""

import math
from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch

from vgen.errors import UserError
from vgen.schedules.building import Step, check_grid, make_plan
from vgen.schedules.plan import Kind, Plan, RandomOrder
from vgen.schedules.scans import SCANS, scan_order


def randar(
    *,
    grid: Sequence[int],
    num_condition: int = 1,
    steps: int | None = None,
    order: str = "random",
    num_known: int = 0,
) -> Plan:
    """Plan of random-order autoregressive modeling with position queries (RandAR, arXiv 2412.01827).

    Slots: the condition, then for every token of the order a query at the token's place, which predicts it, and the
    token. All see what lies before them. A pass that decides several tokens feeds all their queries after the tokens
    of the last pass, each with the query that asked for it; queries that wait for their token are overwritten then, so
    that the cache always holds the training layout. Training, and decoding with ``order=random``, draw an order per
    sample. With one token per pass decoding is exact.

    Args:
        grid: token grid of any number of axes.
        num_condition: number of condition slots.
        steps: passes wanted, 1..N tokens; tokens per pass follow the cosine rule of the original code, which needs two
            passes at least; null = one token per pass.
        order: ``random`` or a scan of :data:`vgen.schedules.scans.SCANS`.
        num_known: leading tokens that are given (inpainting, outpainting, extrapolation); fed in the first pass.

    Raises:
        UserError: for a number of steps or known tokens out of range, or an unknown order.
    """
    sides = check_grid(grid, num_condition)
    tokens = prod(sides)
    if order != "random" and order not in SCANS:
        raise UserError(f"schedule.order={order} is unknown; choose random or one of {', '.join(SCANS)}")
    if not 0 <= num_known < tokens:
        raise UserError(f"schedule.num_known={num_known} must lie in 0..{tokens - 1}: something must be left to decide")
    if steps is not None and not 1 <= steps <= tokens:
        raise UserError(f"schedule.steps={steps} must lie in 1..{tokens}, the number of tokens, or be null")

    slots = torch.arange(num_condition + 2 * tokens - 1)
    index = slots - num_condition
    is_condition, is_query = index < 0, (index >= 0) & (index % 2 == 0)
    token = torch.div(index, 2, rounding_mode="floor")
    query = torch.arange(tokens) * 2 + num_condition
    reads = torch.stack([query, torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens)], dim=1)
    kind = torch.where(is_condition, Kind.CONDITION, torch.where(is_query, Kind.QUERY, Kind.TOKEN))
    return make_plan(
        name="randar",
        grid=sides,
        num_condition=num_condition,
        order=torch.arange(tokens) if order == "random" else scan_order(order, sides, key="schedule.order"),
        kind=kind,
        source=torch.where(is_condition, slots, token),
        position=torch.where(is_condition, -1, token),
        target=torch.where(is_query, token, -1),
        level_q=slots,
        level_k=slots,
        reads=reads,
        steps=_steps(tokens, num_condition, group_sizes(tokens - num_known, steps), num_known),
        exact=steps is None or steps == tokens,
        any_order=True,
        random_order=RandomOrder() if order == "random" else None,
        shuffled=order == "random",
        num_known=num_known,
    )


def group_sizes(tokens: int, steps: int | None) -> list[int]:
    """Tokens decided by each pass: few at first, more as the picture becomes known (cosine rule of the public code)."""
    if steps is None or steps >= tokens:
        return [1] * tokens
    sizes, decided, current = [], 0, 1
    while decided < tokens:
        sizes.append(current)
        decided += current
        wanted = min(tokens, int((1 - math.cos(math.pi / 2 * (len(sizes) + 1) / steps)) * tokens + 1))
        current = min(max(wanted - decided, 1), tokens - decided)
    return sizes


def _steps(tokens: int, num_condition: int, sizes: list[int], num_known: int) -> list[Step]:
    """The passes; cache rows are filled without gaps."""
    starts = [num_known]
    for size in sizes:
        starts.append(starts[-1] + size)
    first = list(range(num_condition + 2 * num_known)) + [num_condition + 2 * k for k in range(starts[0], starts[1])]
    steps = [Step(first, range(starts[0], starts[1]), rows=range(len(first)))]
    for (begin, end), following in zip(pairwise(starts), starts[2:], strict=False):
        # The token of the first query stands behind it; the later queries of the last pass are fed again, each in
        # front of its token.
        settled = list(range(num_condition + 2 * begin + 1, num_condition + 2 * end))
        asked = [num_condition + 2 * k for k in range(end, following)]
        row = settled[0]
        fed = settled + asked
        steps.append(Step(fed, range(end, following), rows=range(row, row + len(fed))))
    return steps
