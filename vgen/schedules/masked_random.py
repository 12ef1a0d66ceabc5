"""Masked order of chance: every pass decides some of the open tokens, which ones is drawn beforehand."""

import math
from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch

from vgen.errors import UserError
from vgen.schedules.building import check_grid
from vgen.schedules.masked import bidirectional_plan
from vgen.schedules.masking import Masking, Ratio, check_ratio, hidden_share
from vgen.schedules.plan import Plan


def masked_random(
    *,
    grid: Sequence[int],
    num_condition: int = 1,
    steps: int = 8,
    ratio: Ratio = "cosine",
    training_ratio: Ratio = "arccos",
) -> Plan:
    """Plan of masked generation in random order (MAR, arXiv 2406.11838; as MaskGen's continuous models decode).

    Networks are trained as for :func:`vgen.schedules.masked.masked` and every pass feeds the same slots, but each
    decides only its own tokens, in an order drawn per sample, so that nothing needs to be compared. Training hides
    ceil(N share) tokens.

    Args:
        grid: token grid of any number of axes.
        num_condition: number of condition slots.
        steps: passes, 1..N.
        ratio: share of tokens open after each pass of decoding, see :func:`vgen.schedules.masked.masked`; every pass
            decides at least one.
        training_ratio: share of hidden tokens over a uniform draw, in training.

    Raises:
        UserError: for an option out of range.
    """
    sides = check_grid(grid, num_condition)
    tokens = prod(sides)
    check_ratio(ratio)
    check_ratio(training_ratio)
    if not 1 <= steps <= tokens:
        raise UserError(f"schedule.steps={steps} must lie in 1..{tokens}, the number of tokens")
    return bidirectional_plan(
        name="masked_random",
        grid=sides,
        num_condition=num_condition,
        decided=[torch.arange(start, end) for start, end in pairwise(known_after(tokens, steps, ratio))],
        masking=Masking(training_ratio, rounding="up"),
        shuffled=True,
    )


def known_after(tokens: int, steps: int, ratio: Ratio) -> list[int]:
    """Tokens known in front of the first pass and after each; every pass has one to decide."""
    known = [0]
    for index in range(1, steps + 1):
        wanted = tokens - math.floor(tokens * hidden_share(ratio, index / steps)) if index < steps else tokens
        known.append(min(max(known[-1] + 1, wanted), tokens - (steps - index)))
    return known
