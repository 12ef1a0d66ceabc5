"""Masked order: all tokens at once by a bidirectional network, refined over a few passes."""

import math
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import get_args

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.random import keyed_permutation
from vgen.schedules.building import Step, check_grid, make_plan
from vgen.schedules.course import Policy
from vgen.schedules.masking import Masking, Ratio, check_ratio
from vgen.schedules.plan import Grid, Kind, Plan
from vgen.schedules.unmasking import Confidence, Unmasking


def masked(
    *,
    grid: Sequence[int],
    num_condition: int = 1,
    steps: int = 8,
    ratio: Ratio = "arccos",
    noise_temperature: float = 4.5,
    draw_temperature: float | None = None,
    softmax_annealing: bool = True,
    confidence: Confidence = "logit",
) -> Plan:
    """Plan of masked generation (MaskGIT, arXiv 2202.04200; as TiTok's generators do it, arXiv 2406.07550).

    Slots: the condition, then every token of the grid; all see all. A token that is not known is fed as the mask token,
    and every token slot predicts its own token. Training hides a random share of the tokens. Every pass of decoding
    feeds all slots, without a cache, decides all open tokens and keeps the most confident
    (:class:`vgen.schedules.unmasking.Unmasking`). How many tokens a pass keeps is fixed, which ones is not:
    ``forwards`` shows one example. Under greedy sampling the tokens are the most likely ones, and the noise still mixes
    the places.

    Args:
        grid: token grid of any number of axes.
        num_condition: number of condition slots.
        steps: passes, 1..N.
        ratio: share of hidden tokens, over a uniform draw in training and over the passes in decoding: ``arccos``,
            ``cosine``, ``linear``, ``square`` or ``root``.
        noise_temperature: noise on token draws and confidences in front of the first pass, >= 0, falling to 0.
        draw_temperature: fixed temperature of the token draws, >= 0; null = that of the noise.
        softmax_annealing: sharpen the logits from pass to pass.
        confidence: ``logit`` or ``log-probability``.

    Raises:
        UserError: for an option out of range.
    """
    sides = check_grid(grid, num_condition)
    tokens = prod(sides)
    check_ratio(ratio)
    if not 1 <= steps <= tokens:
        raise UserError(f"schedule.steps={steps} must lie in 1..{tokens}, the number of tokens")
    for name, value in (("noise_temperature", noise_temperature), ("draw_temperature", draw_temperature)):
        if value is not None and not (math.isfinite(value) and 0 <= value <= 1000):
            raise UserError(f"schedule.{name}={value} must lie in [0, 1000]")
    if confidence not in get_args(Confidence):
        raise UserError(f"schedule.confidence={confidence} is unknown; choose {' or '.join(get_args(Confidence))}")
    policy = Unmasking(
        num_condition=num_condition,
        num_tokens=tokens,
        steps=steps,
        ratio=ratio,
        noise_temperature=noise_temperature,
        draw_temperature=draw_temperature,
        softmax_annealing=softmax_annealing,
        confidence=confidence,
    )
    example = keyed_permutation(tokens, 0)
    kept = [tokens - opened for opened in policy.open_before()] + [tokens]
    return bidirectional_plan(
        name="masked",
        grid=sides,
        num_condition=num_condition,
        decided=[example[start:end].sort().values for start, end in pairwise(kept)],
        policy=policy,
        masking=Masking(ratio),
    )


def bidirectional_plan(
    *,
    name: str,
    grid: Grid,
    num_condition: int,
    decided: Sequence[Tensor],
    masking: Masking,
    policy: Policy | None = None,
    shuffled: bool = False,
) -> Plan:
    """Plan whose every pass feeds the condition and all tokens, all of which see all.

    Args:
        name: see :class:`vgen.schedules.plan.Plan`, like those not described here.
        grid: token grid.
        num_condition: number of condition slots.
        decided: order indices int64 that each pass decides.
        masking: see :class:`vgen.schedules.plan.Plan`.
        policy: see :class:`vgen.schedules.plan.Plan`.
        shuffled: see :class:`vgen.schedules.plan.Plan`.
    """
    tokens = prod(grid)
    slots = torch.arange(num_condition + tokens)
    token = slots - num_condition
    is_token = token >= 0
    everything = torch.zeros_like(slots)
    return make_plan(
        name=name,
        grid=grid,
        num_condition=num_condition,
        order=torch.arange(tokens),
        kind=torch.where(is_token, Kind.TOKEN, Kind.CONDITION),
        source=torch.where(is_token, token, slots),
        position=torch.where(is_token, token, -1),
        target=torch.where(is_token, token, -1),
        level_q=everything,
        level_k=everything,
        reads=torch.stack([slots[is_token], everything[is_token], token[is_token]], dim=1),
        steps=[Step(slots.tolist(), targets.tolist()) for targets in decided],
        exact=False,
        shuffled=shuffled,
        policy=policy,
        masking=masking,
    )
