"""Parallel order: one token of every region per pass, after the regions' first tokens one by one (PAR)."""

from collections.abc import Sequence
from math import isqrt, prod

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.schedules.building import Step, check_grid, make_plan
from vgen.schedules.plan import Grid, Kind, Plan


def parallel(*, grid: Sequence[int], num_condition: int = 1, regions: int | Sequence[int] = 4) -> Plan:
    """Plan of parallelized autoregressive modeling (PAR, arXiv 2412.15119, section 3).

    The picture is cut into n = M_h x M_w equal regions. Their first tokens are decided one by one; then one pass feeds
    the last of them with n - 1 learned transition slots, and every later pass feeds the n tokens just decided, each
    predicting the next token of its region. Groups of n slots see each other and everything before. On T x H x W grids
    the regions cut every frame and time is kept sequential: frame by frame, only the first frame starts one by one.

    Slots: C condition slots, tokens 0..n-1, the transition slots, tokens n..N-n-1; the slot C - 1 + k predicts token k.
    Condition and transition slots have no place. The original's last n - 1 training slots, whose logits it discards, do
    not exist here. Passes: n - 1 + N / n. One region is the raster order.

    Args:
        grid: token grid (H, W) or (T, H, W).
        num_condition: number of condition slots C.
        regions: n, a square number for M x M regions, or (M_h, M_w).

    Raises:
        UserError: for a grid of another number of axes, or regions that do not divide it.
    """
    sides = check_grid(grid, num_condition)
    cuts = _cuts(regions, sides)
    tokens, group = prod(sides), prod(cuts)
    transitions = group - 1 if tokens > group else 0
    first = num_condition - 1

    slots = torch.arange(first + tokens)
    place = slots - first
    is_condition = place <= 0
    is_learned = (place > group) & (place < 2 * group)
    is_token = ~is_condition & ~is_learned
    token = torch.where(place <= group, place - 1, place - group)
    source = torch.where(is_condition, slots, torch.where(is_learned, place - group - 1, token))
    grouped = place >= group
    steps = [Step(range(num_condition), [0])]
    steps += [Step([first + k], [k]) for k in range(1, group)]
    steps += [Step(range(first + k, first + k + group), range(k, k + group)) for k in range(group, tokens, group)]
    return make_plan(
        name="parallel",
        grid=sides,
        num_condition=num_condition,
        order=_region_order(sides, cuts),
        kind=torch.where(is_condition, Kind.CONDITION, torch.where(is_learned, Kind.LEARNED, Kind.TOKEN)),
        source=source,
        position=torch.where(is_token, token, -1),
        target=torch.where(place >= 0, place, -1),
        level_q=torch.where(grouped, first + group * (place // group + 1) - 1, slots),
        level_k=slots,
        reads=torch.stack([slots[first:], torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens)], dim=1),
        steps=steps,
        num_learned=transitions,
    )


def _cuts(regions: int | Sequence[int], sides: Grid) -> tuple[int, int]:
    """Regions along height and width."""
    if len(sides) not in (2, 3):
        raise UserError(f"schedule 'parallel' cuts height and width into regions; the grid {sides} has not both")
    if isinstance(regions, int):
        root = isqrt(max(regions, 0))
        if root < 1 or root * root != regions:
            raise UserError(
                f"schedule.regions={regions} is not a square number (1, 4, 9, ..); for other cuts give [rows, columns]"
            )
        cuts = (root, root)
    else:
        if len(regions) != 2 or min(regions) < 1:
            raise UserError(f"schedule.regions={list(regions)} must be a square number or [rows, columns], both >= 1")
        cuts = (int(regions[0]), int(regions[1]))
    if sides[-2] % cuts[0] or sides[-1] % cuts[1]:
        raise UserError(
            f"schedule.regions={cuts[0]}x{cuts[1]} does not divide the grid {sides}; choose regions whose numbers "
            f"divide {sides[-2]} rows and {sides[-1]} columns"
        )
    return cuts


def _region_order(sides: Grid, cuts: tuple[int, int]) -> Tensor:
    """Raster position of every order index: frame, place inside a region, region (each in raster order)."""
    frames = prod(sides[:-2])
    rows, columns = sides[-2] // cuts[0], sides[-1] // cuts[1]
    raster = torch.arange(prod(sides)).view(frames, cuts[0], rows, cuts[1], columns)
    return raster.permute(0, 2, 4, 1, 3).flatten()
