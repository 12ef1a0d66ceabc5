"""What a sweep of guidance scales measures next, and which of several processes does it."""

import fcntl
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALLEST_SCALE = 1.0
LARGEST_SCALE = 16.0
STEP = 1.5


@dataclass(frozen=True)
class Measurement:
    """A row of the sweep: a plan decoded at a guidance scale, with how many samples."""

    plan: str
    scale: float
    samples: int


def next_measurement(
    plans: Sequence[str],
    rows: Sequence[dict[str, Any]],
    *,
    scales: Sequence[float],
    samples: int,
    finals: Sequence[int] = (),
) -> Measurement | None:
    """What is to be measured next: all plans at one scale before any at the next; scores of more samples last.

    Args:
        plans: labels of the plans.
        rows: measurements so far.
        scales: tried for every plan, and beyond them on the side where the best scale is an edge of what was tried.
        samples: at each scale.
        finals: numbers of samples at a plan's best scale; all plans get the first before any gets the second.

    Returns:
        None when nothing is left.
    """
    known: dict[str, dict[float, float]] = {plan: {} for plan in plans}
    finished = {(row["plan"], row["scale"], row["samples"]) for row in rows}
    for row in rows:
        if row["plan"] in known and row["samples"] == samples:
            known[row["plan"]][row["scale"]] = row["fd"]
    wanted = {plan: scale for plan in plans if (scale := next_scale(known[plan], scales)) is not None}
    if wanted:
        plan = min(wanted, key=lambda plan: len(known[plan]))
        return Measurement(plan, wanted[plan], samples)
    for final in finals:
        for plan in plans:
            best = min(known[plan], key=known[plan].__getitem__)
            if (plan, best, final) not in finished:
                return Measurement(plan, best, final)
    return None


def next_scale(known: dict[float, float], scales: Sequence[float]) -> float | None:
    """The scale to try next for a plan.

    Args:
        known: distances at the scales tried so far.
        scales: to be tried first.

    Returns:
        None once the best scale lies between others, or cannot be passed: guidance of 1 is none, and beyond
        ``LARGEST_SCALE`` nothing is tried.
    """
    for scale in scales:
        if scale not in known:
            return scale
    best = min(known, key=known.__getitem__)
    # The best scale must lie inside what was tried, or the order that likes guidance most or least is wronged.
    if best == max(known) < LARGEST_SCALE:
        return best * STEP
    if best == min(known) > SMALLEST_SCALE:
        return max(SMALLEST_SCALE, best / STEP)
    return None


def claim(path: Path, held: ExitStack) -> bool:
    """Take a lock file until ``held`` or the process ends; False where another process has it."""
    path.parent.mkdir(exist_ok=True)
    file = held.enter_context(path.open("w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
