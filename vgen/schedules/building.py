"""From the passes a schedule states to a complete plan, and the checks every schedule starts with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.schedules.course import Policy
from vgen.schedules.masking import Masking
from vgen.schedules.plan import Feed, Forward, Grid, Plan, RandomOrder, Read


@dataclass(frozen=True)
class Step:
    """A pass as a schedule states it, before visibility is rendered.

    Attributes:
        slots: slots fed, in the order of the cache rows they are written to.
        targets: order indices decided.
        rows: cache rows, by default the slot numbers.
        sources: what token slots are fed, by default the slots' own sources; another source is a provisional token.
        visible: bool [F, rows of the plan], what the fed slots see instead of what :func:`make_plan` derives; for
            decoders that read cache rows nobody wrote, which hold zeros.
    """

    slots: Sequence[int]
    targets: Sequence[int]
    rows: Sequence[int] | None = None
    sources: Sequence[int] | None = None
    visible: Tensor | None = None


def make_plan(
    *,
    name: str,
    grid: Grid,
    num_condition: int,
    order: Tensor,
    kind: Tensor,
    source: Tensor,
    position: Tensor,
    target: Tensor,
    level_q: Tensor,
    level_k: Tensor,
    reads: Tensor,
    steps: Sequence[Step],
    num_heads: int = 1,
    num_learned: int = 0,
    exact: bool = True,
    any_order: bool = False,
    random_order: RandomOrder | None = None,
    shuffled: bool = False,
    num_known: int = 0,
    policy: Policy | None = None,
    masking: Masking | None = None,
) -> Plan:
    """Complete a plan: render what every pass sees from the levels and from the cache rows written so far.

    A fed slot sees a cache row iff the row holds a slot (written by this or an earlier pass) whose ``level_k`` does not
    exceed the fed slot's ``level_q``; a row that holds a provisional token is seen only by the slot that wrote it.
    Arguments are those of :class:`Plan` and :class:`Step`.
    """
    forwards: list[Forward] = []
    num_rows = 1 + max(max(step.slots if step.rows is None else step.rows) for step in steps)
    occupant = torch.full((num_rows,), -1)
    provisional = torch.zeros(num_rows, dtype=torch.bool)
    for step in steps:
        slots = torch.as_tensor(step.slots, dtype=torch.int64)
        rows = slots if step.rows is None else torch.as_tensor(step.rows, dtype=torch.int64)
        fed = source[slots] if step.sources is None else torch.as_tensor(step.sources, dtype=torch.int64)
        occupant[rows], provisional[rows] = slots, fed != source[slots]
        visible = (occupant >= 0) & (level_k[occupant][None, :] <= level_q[slots][:, None])
        visible &= ~provisional | (rows[:, None] == torch.arange(num_rows))
        visible = visible if step.visible is None else step.visible
        prefix = int(visible.any(0).nonzero().max()) + 1
        visible = visible[:, :prefix]
        consecutive = torch.equal(rows, torch.arange(int(rows[0]), int(rows[0]) + len(rows)))
        targets = torch.as_tensor(step.targets, dtype=torch.int64)
        forwards.append(
            Forward(
                slots=slots,
                feed=Feed.build(slots, kind[slots], fed, position[slots], target[slots]),
                rows=rows,
                row_start=int(rows[0]) if consecutive else -1,
                prefix=prefix,
                settled=min(int(rows.min()), prefix),
                mask=None if bool(visible.all()) else visible,
                targets=targets,
                read=_read_of_step(reads, slots, targets, num_heads),
            )
        )
    return Plan(
        name=name,
        grid=grid,
        num_condition=num_condition,
        order=order,
        kind=kind,
        source=source,
        position=position,
        target=target,
        level_q=level_q,
        level_k=level_k,
        reads=reads,
        forwards=tuple(forwards),
        num_rows=num_rows,
        num_heads=num_heads,
        num_learned=num_learned,
        exact=exact,
        any_order=any_order,
        random_order=random_order,
        shuffled=shuffled,
        num_known=num_known,
        policy=policy,
        masking=masking,
    )


def _read_of_step(reads: Tensor, slots: Tensor, targets: Tensor, num_heads: int) -> Read:
    """The reads whose target the pass decides, in indices local to the pass."""
    mine = reads[torch.isin(reads[:, 2], targets)]
    slot_index = {int(s): i for i, s in enumerate(slots)}
    target_index = {int(t): i for i, t in enumerate(targets)}
    missing = [int(s) for s in mine[:, 0] if int(s) not in slot_index]
    assert not missing, f"slots {missing} are read in a pass that does not feed them"
    local = [(slot_index[int(s)], int(h), target_index[int(t)]) for s, h, t in mine]
    return Read.build(torch.tensor(local, dtype=torch.int64), len(targets), num_heads)


def parse_grid(text: str) -> Grid:
    """Turn ``16x16`` or ``4x16x16`` into a grid.

    Raises:
        UserError: if the text is not made of positive integers joined by ``x``.
    """
    parts = text.lower().split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"grid '{text}' is not of the form 16x16 or 4x16x16")
    return tuple(int(part) for part in parts)


def check_grid(grid: Sequence[int], num_condition: int) -> Grid:
    """Validate the arguments every schedule takes.

    Raises:
        UserError: if the grid is empty or holds a non-positive side, or if there is no condition slot.
    """
    sides = tuple(int(side) for side in grid)
    if not sides or min(sides) < 1:
        raise UserError(f"grid {sides} must have one to three positive sides")
    if num_condition < 1:
        raise UserError("num_condition must be at least 1: the first token is predicted by the last condition slot")
    return sides
