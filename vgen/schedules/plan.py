"""The plan record: a decode order as data.

A plan lists the slots of the teacher-forced sequence, what each slot may see, which slot and head predict which token,
and what every forward pass of the decoding loop feeds and decides. Training mask, loss targets, decoding loop, number
of passes and decode animation are all derived from it. The record knows nothing about networks.

Two index spaces are used. A *raster position* counts grid cells with the last axis fastest. An *order index* counts
tokens in the order of the schedule; ``order[k]`` is the raster position of order index k. Everything in a plan counts
in order indices, so that an order drawn per sample only replaces ``order``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from math import prod
from typing import Any

import torch
from torch import Tensor

from vgen.errors import UserError

Grid = tuple[int, ...]


class Kind(IntEnum):
    """What a slot holds."""

    CONDITION = 0
    TOKEN = 1
    LEARNED = 2


@dataclass(frozen=True, eq=False)
class Feed:
    """The inputs of one set of slots, split by kind so that embedding is three gathers and one rearrangement.

    Attributes:
        conditions: int64 [number of condition slots], index into the condition embeddings.
        tokens: int64 [number of token slots], order index of the token fed.
        learned: int64 [number of learned slots], index into the learned embeddings.
        arrange: int64 [F] that brings the concatenation (conditions, tokens, learned) into slot order, or None if it is
            in slot order already.
        position: int64 [F], order index whose grid coordinates rotate the slot, -1 for a slot without a place.
        target: int64 [F], order index of the token the slot predicts next, -1 for none.
    """

    conditions: Tensor
    tokens: Tensor
    learned: Tensor
    arrange: Tensor | None
    position: Tensor
    target: Tensor

    @staticmethod
    def build(kind: Tensor, source: Tensor, position: Tensor, target: Tensor) -> "Feed":
        """Group slots by kind; all arguments are int64 [F] in slot order."""
        groups = [torch.nonzero(kind == k).flatten() for k in Kind]
        inverse = torch.cat(groups).argsort()
        identity = torch.equal(inverse, torch.arange(len(kind)))
        return Feed(
            conditions=source[groups[Kind.CONDITION]],
            tokens=source[groups[Kind.TOKEN]],
            learned=source[groups[Kind.LEARNED]],
            arrange=None if identity else inverse,
            position=position,
            target=target,
        )

    def to(self, device: torch.device) -> "Feed":
        """Copy with every index tensor on a device."""
        move: dict[str, Any] = {
            name: value if value is None else value.to(device) for name, value in vars(self).items()
        }
        return Feed(**move)


@dataclass(frozen=True, eq=False)
class Read:
    """How the logits of the decided tokens are read from hidden states: target logits = mean over their reads.

    Attributes:
        slots: per head, int64 [r_h], index of the hidden state among the slots of the pass.
        targets: per head, int64 [r_h], index of the target among the targets of the pass.
        weights: per head, float32 [r_h], one over the number of reads of that target.
        simple: every target has exactly one read, by head 0, and the reads are in target order.
    """

    slots: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    simple: bool

    @staticmethod
    def build(reads: Tensor, num_targets: int, num_heads: int) -> "Read":
        """Group reads int64 [R, 3] of (slot, head, target) by head."""
        count = torch.bincount(reads[:, 2], minlength=num_targets)
        assert int(count.min()) > 0, "a target without a read"
        ordered = reads[reads[:, 2].argsort(stable=True)]
        slots, targets, weights = [], [], []
        for head in range(num_heads):
            mine = ordered[ordered[:, 1] == head]
            slots.append(mine[:, 0])
            targets.append(mine[:, 2])
            weights.append(1.0 / count[mine[:, 2]].float())
        simple = bool((count == 1).all()) and bool((reads[:, 1] == 0).all())
        return Read(tuple(slots), tuple(targets), tuple(weights), simple)

    def to(self, device: torch.device) -> "Read":
        """Copy on a device."""
        return Read(
            tuple(t.to(device) for t in self.slots),
            tuple(t.to(device) for t in self.targets),
            tuple(t.to(device) for t in self.weights),
            self.simple,
        )


@dataclass(frozen=True, eq=False)
class Forward:
    """One pass of the decoding loop.

    Attributes:
        slots: int64 [F], the slots fed.
        feed: their inputs.
        rows: int64 [F], cache rows their keys and values are written to.
        row_start: first of the rows when they are consecutive, otherwise -1.
        prefix: number of leading cache rows the pass attends over.
        mask: bool [F, prefix], True = visible, or None when every fed slot sees the whole prefix.
        targets: int64 [D], order indices decided by the pass.
        read: where their logits come from.
    """

    slots: Tensor
    feed: Feed
    rows: Tensor
    row_start: int
    prefix: int
    mask: Tensor | None
    targets: Tensor
    read: Read

    def to(self, device: torch.device) -> "Forward":
        """Copy on a device."""
        return Forward(
            slots=self.slots.to(device),
            feed=self.feed.to(device),
            rows=self.rows.to(device),
            row_start=self.row_start,
            prefix=self.prefix,
            mask=None if self.mask is None else self.mask.to(device),
            targets=self.targets.to(device),
            read=self.read.to(device),
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """A decode order on one grid; see the module docstring for the index spaces.

    Attributes:
        name: name of the order, for messages and pictures only; nothing branches on it.
        grid: token grid, (L,), (H, W) or (T, H, W).
        num_condition: number of condition slots at the start of the sequence.
        order: int64 [N], raster position of every order index.
        kind: int64 [S], a :class:`Kind` per slot.
        source: int64 [S], condition index, order index of the token fed, or index of the learned embedding.
        position: int64 [S], order index whose coordinates rotate the slot; -1 = no place.
        target: int64 [S], order index the slot predicts next; -1 = none.
        level_q: int64 [S]; slot j is visible to slot i iff level_k[j] <= level_q[i].
        level_k: int64 [S].
        reads: int64 [R, 3], triples (slot, head, order index of the target).
        forwards: the passes of the decoding loop.
        num_rows: cache rows the passes need.
        num_heads: output heads the order needs.
        num_learned: learned embeddings the order needs.
        exact: decoding sees exactly what training saw.
    """

    name: str
    grid: Grid
    num_condition: int
    order: Tensor
    kind: Tensor
    source: Tensor
    position: Tensor
    target: Tensor
    level_q: Tensor
    level_k: Tensor
    reads: Tensor
    forwards: tuple[Forward, ...]
    num_rows: int
    num_heads: int = 1
    num_learned: int = 0
    exact: bool = True
    _memo: dict = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        """Number of tokens N of the grid."""
        return prod(self.grid)

    @property
    def num_slots(self) -> int:
        """Length S of the teacher-forced sequence."""
        return len(self.kind)

    def on(self, device: torch.device) -> "DevicePlan":
        """The index tensors the network and the loop use, on a device; built once per device."""
        if device not in self._memo:
            # The memo outlives this call: tensors born in inference mode could not be used in training later.
            with torch.inference_mode(False):
                self._memo[device] = DevicePlan.build(self, device)
        return self._memo[device]

    def visible(self) -> Tensor:
        """Dense visibility of the teacher-forced sequence, bool [S queries, S keys]."""
        return self.level_k[None, :] <= self.level_q[:, None]

    def same_training(self, other: "Plan") -> bool:
        """Whether both plans teach a network the same thing: a network trained with one decodes by the other."""
        names = ("order", "kind", "source", "position", "target", "level_q", "level_k", "reads")
        sizes = (self.grid, self.num_condition, self.num_heads, self.num_learned)
        return sizes == (other.grid, other.num_condition, other.num_heads, other.num_learned) and all(
            torch.equal(getattr(self, name), getattr(other, name)) for name in names
        )

    def decided_before(self) -> list[int]:
        """Number of tokens decided before each pass."""
        counts, total = [], 0
        for forward in self.forwards:
            counts.append(total)
            total += len(forward.targets)
        return counts

    def step_of(self) -> Tensor:
        """Pass that decides each raster position, int64 [N]."""
        step = torch.empty(self.num_tokens, dtype=torch.int64)
        for index, forward in enumerate(self.forwards):
            step[self.order[forward.targets]] = index
        return step


@dataclass(frozen=True, eq=False)
class DevicePlan:
    """What teacher forcing and the decoding loop read from a plan, on one device.

    Attributes:
        order: int64 [N].
        feed: inputs of the whole teacher-forced sequence.
        read: read-out of all N targets in RASTER order.
        causal: the visibility is lower triangular, so no mask tensor is needed.
        mask: bool [S, S], or None when causal.
        forwards: the passes.
    """

    order: Tensor
    feed: Feed
    read: Read
    causal: bool
    mask: Tensor | None
    forwards: tuple[Forward, ...]

    @staticmethod
    def build(plan: Plan, device: torch.device) -> "DevicePlan":
        """Render a plan on a device."""
        visible = plan.visible()
        causal = torch.equal(visible, torch.ones_like(visible).tril())
        reads = plan.reads.clone()
        reads[:, 2] = plan.order[plan.reads[:, 2]]
        return DevicePlan(
            order=plan.order.to(device),
            feed=Feed.build(plan.kind, plan.source, plan.position, plan.target).to(device),
            read=Read.build(reads, plan.num_tokens, plan.num_heads).to(device),
            causal=causal,
            mask=None if causal else visible.to(device),
            forwards=tuple(forward.to(device) for forward in plan.forwards),
        )


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
                feed=Feed.build(kind[slots], fed, position[slots], target[slots]),
                rows=rows,
                row_start=int(rows[0]) if consecutive else -1,
                prefix=prefix,
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
