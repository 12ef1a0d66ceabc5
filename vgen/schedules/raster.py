"""Raster order: one token per pass, last axis fastest."""

from collections.abc import Sequence
from math import prod

import torch

from vgen.schedules.building import Step, check_grid, make_plan
from vgen.schedules.plan import Kind, Plan


def raster(*, grid: Sequence[int], num_condition: int = 1) -> Plan:
    """Plan of the raster order (LlamaGen, arXiv 2406.06525, section 2).

    Slots: the condition, then tokens 0..N-2; slot i sees slots 0..i; the slot before a token predicts it. N passes, the
    first of which feeds all condition slots; the last token is never fed.

    Args:
        grid: token grid of any number of axes.
        num_condition: number of condition slots (1 for a class, 120 for LlamaGen's captions).

    Raises:
        UserError: for an empty grid or no condition slot.
    """
    sides = check_grid(grid, num_condition)
    tokens = prod(sides)
    slots = torch.arange(num_condition + tokens - 1)
    token = slots - num_condition
    is_token = token >= 0
    first_read = num_condition - 1
    steps = [Step(range(num_condition), [0])]
    steps += [Step([first_read + k], [k]) for k in range(1, tokens)]
    return make_plan(
        name="raster",
        grid=sides,
        num_condition=num_condition,
        order=torch.arange(tokens),
        kind=torch.where(is_token, Kind.TOKEN, Kind.CONDITION),
        source=torch.where(is_token, token, slots),
        position=torch.where(is_token, token, -1),
        target=torch.where(slots >= first_read, token + 1, -1),
        level_q=slots,
        level_k=slots,
        reads=torch.stack([slots[first_read:], torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens)], dim=1),
        steps=steps,
    )
