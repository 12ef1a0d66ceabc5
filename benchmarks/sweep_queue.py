"""What a sweep of guidance scales measures next, and which of several processes does it."""

import fcntl
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST_SCALE = 16.0


@dataclass(frozen=True)
class Measurement:
    """A row of the sweep: a plan decoded at a guidance scale, with how many samples."""

    plan: str
    scale: float
    samples: int


def next_measurement(
    plans: Sequence[str], rows: Sequence[dict[str, Any]], *, scales: Sequence[float], samples: int, final: int
) -> Measurement | None:
    """What is to be measured next: all plans at one scale before any at the next; final scores last.

    Args:
        plans: labels of the plans.
        rows: measurements so far.
        scales: tried for every plan, and beyond them while the largest tried is the best.
        samples: at each scale.
        final: at a plan's best scale.

    Returns:
        None when nothing is left.
    """
    known: dict[str, dict[float, float]] = {plan: {} for plan in plans}
    finished = {(row["plan"], row["scale"]) for row in rows if row["samples"] == final}
    for row in rows:
        if row["plan"] in known and row["samples"] == samples:
            known[row["plan"]][row["scale"]] = row["fd"]
    wanted = {plan: scale for plan in plans if (scale := _next_scale(known[plan], scales)) is not None}
    if wanted:
        plan = min(wanted, key=lambda plan: len(known[plan]))
        return Measurement(plan, wanted[plan], samples)
    for plan in plans:
        best = min(known[plan], key=known[plan].__getitem__)
        if (plan, best) not in finished:
            return Measurement(plan, best, final)
    return None


def _next_scale(known: dict[float, float], scales: Sequence[float]) -> float | None:
    """The next scale of a plan whose distances at some scales are known."""
    for scale in scales:
        if scale not in known:
            return scale
    best = min(known, key=known.__getitem__)
    # The best scale must lie inside what was tried, or the order that likes guidance most is wronged.
    return best * 1.5 if best == max(known) < LARGEST_SCALE else None


def claim(path: Path, held: ExitStack) -> bool:
    """Take a lock file until ``held`` or the process ends; False where another process has it."""
    path.parent.mkdir(exist_ok=True)
    file = held.enter_context(path.open("w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
