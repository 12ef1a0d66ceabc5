"""The plan record: a decode order as data.

A plan lists the slots of the teacher-forced sequence, what each slot may see, which slot and head predict which token,
and what every forward pass of the decoding loop feeds and decides. Training mask, loss targets, decoding loop, number
of passes and decode animation are all derived from it. The record knows nothing about networks.

Two index spaces are used. A *raster position* counts grid cells with the last axis fastest. An *order index* counts
tokens in the order of the schedule; ``order[k]`` is the raster position of order index k. Everything in a plan counts
in order indices, so that an order drawn per sample only replaces ``order``.
"""

import math
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vgen.schedules.masking import Masking

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from vgen.schedules.course import Policy

Grid = tuple[int, ...]


class Kind(IntEnum):
    """What a slot holds."""

    CONDITION = 0
    TOKEN = 1
    LEARNED = 2
    QUERY = 3


@dataclass(frozen=True, eq=False)
class Feed:
    """The inputs of one set of slots, split by kind so that embedding is a few gathers and one rearrangement.

    A static plan has one set for the whole batch. Where every sample feeds its own (an order decided at run time), the
    index tensors of tokens, position and target carry a batch axis in front, and all slots hold tokens.

    Attributes:
        slots: int64 [F], numbers of the slots in the teacher-forced sequence.
        conditions: int64 [number of condition slots], index into the condition embeddings.
        tokens: int64 [number of token slots] or [B, F], order index of the token fed.
        token_start: the first of them if they are consecutive and the same for all samples, otherwise -1.
        learned: int64 [number of learned slots], index into the learned embeddings.
        queries: int64 [number of query slots], order index of the token asked for.
        arrange: int64 [F] that brings the concatenation (conditions, tokens, learned, queries) into slot order, or None
            if it is in slot order already.
        position: int64 [F] or [B, F], order index whose grid coordinates place the slot, -1 for a slot without a place.
        target: int64 [F] or [B, F], order index of the token the slot predicts next, -1 for none.
    """

    slots: Tensor
    conditions: Tensor
    tokens: Tensor
    learned: Tensor
    queries: Tensor
    arrange: Tensor | None
    position: Tensor
    target: Tensor
    token_start: int = -1

    @staticmethod
    def build(slots: Tensor, kind: Tensor, source: Tensor, position: Tensor, target: Tensor) -> "Feed":
        """Group slots by kind; all arguments are int64 [F] in slot order."""
        groups = [torch.nonzero(kind == k).flatten() for k in Kind]
        inverse = torch.cat(groups).argsort()
        identity = torch.equal(inverse, torch.arange(len(kind)))
        tokens = source[groups[Kind.TOKEN]]
        start = int(tokens[0]) if len(tokens) else -1
        consecutive = torch.equal(tokens, torch.arange(start, start + len(tokens)))
        return Feed(
            slots=slots,
            conditions=source[groups[Kind.CONDITION]],
            tokens=tokens,
            learned=source[groups[Kind.LEARNED]],
            queries=source[groups[Kind.QUERY]],
            arrange=None if identity else inverse,
            position=position,
            target=target,
            token_start=start if consecutive else -1,
        )

    def to(self, device: torch.device) -> "Feed":
        """Copy with every index tensor on a device."""
        return _mapped(self, lambda value: value.to(device) if isinstance(value, Tensor) else value)


@dataclass(frozen=True, eq=False)
class Read:
    """How the logits of the decided tokens are read from hidden states: target logits = mean over their reads.

    Attributes:
        slots: per head, int64 [r_h], index of the hidden state among the slots of the pass; [B, r_h] where every sample
            reads its own (then ``simple``).
        targets: per head, int64 [r_h], index of the target among the targets of the pass.
        weights: per head, float32 [r_h], one over the number of reads of that target.
        simple: every target has exactly one read, by head 0, and the reads are in target order.
        sources: per head, int64 [targets], the slot read for every target, -1 = none; empty if a head reads several
            slots for one target, or every sample its own.
        shares: per head, float32 [targets], weight of that read.
    """

    slots: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    simple: bool
    sources: tuple[Tensor, ...] = ()
    shares: tuple[Tensor, ...] = ()

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
        sources, shares = [], []
        if all(len(mine) == len(mine.unique()) for mine in targets):
            for slot, mine, weight in zip(slots, targets, weights, strict=True):
                sources.append(torch.full((num_targets,), -1).scatter(0, mine, slot))
                shares.append(torch.zeros(num_targets).scatter(0, mine, weight))
        return Read(tuple(slots), tuple(targets), tuple(weights), simple, tuple(sources), tuple(shares))

    def reordered(self, index: Tensor) -> "Read":
        """The read-out of the targets ``index`` int64 [B, N] of every sample, for a simple read of one head."""
        assert self.simple, "only an order with one read per target can be drawn per sample"
        return Read((self.slots[0][index],), self.targets[:1], self.weights[:1], True)

    def to(self, device: torch.device) -> "Read":
        """Copy on a device."""
        return _mapped(self, lambda value: tuple(t.to(device) for t in value) if isinstance(value, tuple) else value)


@dataclass(frozen=True, eq=False)
class Forward:
    """One pass of the decoding loop.

    Where every sample feeds its own slots, rows, mask and targets carry a batch axis in front (see :class:`Feed`).

    Attributes:
        slots: int64 [F], the slots fed.
        feed: their inputs.
        rows: int64 [F] or [B, F], cache rows their keys and values are written to.
        row_start: first of the rows when they are consecutive, otherwise -1.
        prefix: number of leading cache rows the pass attends over.
        settled: leading ones of these that no fed slot writes; 0 if that differs between samples.
        mask: bool [F, prefix] or [B, 1, F, prefix], True = visible, or None when every fed slot sees the whole prefix.
        targets: int64 [D] or [B, D], order indices decided by the pass.
        read: where their logits come from.
    """

    slots: Tensor
    feed: Feed
    rows: Tensor
    row_start: int
    prefix: int
    settled: int
    mask: Tensor | None
    targets: Tensor
    read: Read

    def to(self, device: torch.device) -> "Forward":
        """Copy on a device."""
        return _mapped(self, lambda value: value.to(device) if hasattr(value, "to") else value)

    def repeated(self, times: int) -> "Forward":
        """The pass of a batch repeated as a whole, for guidance branches; a pass shared by the batch stays as it is."""
        if times == 1 or self.rows.dim() == 1:
            return self

        def repeat(value: Any) -> Any:
            if isinstance(value, Feed):
                return _mapped(value, repeat)
            if isinstance(value, Read):
                return replace(value, slots=tuple(repeat(t) for t in value.slots))
            per_sample = isinstance(value, Tensor) and value.dim() > 1
            return value.repeat(times, *([1] * (value.dim() - 1))) if per_sample else value

        return _mapped(self, repeat)


def _mapped(record: Any, change: Any) -> Any:
    """Copy of a record with a function applied to every field that is set."""
    values = {item.name: getattr(record, item.name) for item in fields(record)}
    return type(record)(**{name: value if value is None else change(value) for name, value in values.items()})


@dataclass(frozen=True)
class RandomOrder:
    """How often training sees a random order instead of the plan's own (RAR, arXiv 2411.00776, section 3.2).

    Attributes:
        start: optimizer step up to which every sample gets a random order.
        end: step from which on none does; linear between.
    """

    start: float = math.inf
    end: float = math.inf

    def share(self, step: int) -> float:
        """Share of samples in random order at an optimizer step, in [0, 1]."""
        if step < self.start:
            return 1.0
        return 0.0 if step >= self.end else 1.0 - (step - self.start) / (self.end - self.start)


@dataclass(frozen=True, eq=False)
class Plan:
    """A decode order on one grid; see the module docstring for the index spaces.

    Attributes:
        name: name of the order, for messages and pictures only; nothing branches on it.
        grid: token grid, (L,), (H, W) or (T, H, W).
        num_condition: number of condition slots at the start of the sequence.
        order: int64 [N], raster position of every order index.
        kind: int64 [S], a :class:`Kind` per slot.
        source: int64 [S], condition index, order index of the token fed or asked for, or learned embedding.
        position: int64 [S], order index whose coordinates place the slot; -1 = no place.
        target: int64 [S], order index the slot predicts next; -1 = none.
        level_q: int64 [S]; slot j is visible to slot i iff level_k[j] <= level_q[i].
        level_k: int64 [S].
        reads: int64 [R, 3], triples (slot, head, order index of the target).
        forwards: the passes of the decoding loop.
        num_rows: cache rows the passes need.
        num_heads: output heads the order needs.
        num_learned: learned embeddings the order needs.
        exact: decoding sees exactly what training saw.
        any_order: the slots themselves tell the network what is fed and what is asked for, so that a network trained in
            one order decodes in every other.
        random_order: how often training draws an order per sample; None = never.
        shuffled: decoding draws an order per sample.
        num_known: the first order indices are given, not decided (inpainting, outpainting).
        policy: chooses the passes while decoding; None = the passes are ``forwards``. With a policy, ``forwards`` is
            the shortest run it can make.
        masking: token slots hold the mask token as long as their token is not known, in decoding, and training hides
            tokens in this way; None = the slots fed hold known tokens only.
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
    any_order: bool = False
    random_order: RandomOrder | None = None
    shuffled: bool = False
    num_known: int = 0
    policy: "Policy | None" = None
    masking: Masking | None = None
    _memo: dict = field(default_factory=dict, init=False, repr=False)

    @property
    def num_tokens(self) -> int:
        """Number of tokens N of the grid."""
        return prod(self.grid)

    @property
    def num_slots(self) -> int:
        """Length S of the teacher-forced sequence."""
        return len(self.kind)

    @property
    def has_queries(self) -> bool:
        """Whether the order asks for tokens by position, which needs the query embedding."""
        return bool((self.kind == Kind.QUERY).any())

    @property
    def num_passes(self) -> int | None:
        """Passes of every run; None where they depend on the run."""
        return len(self.forwards) if self.policy is None else self.policy.num_passes

    @property
    def needs_cache(self) -> bool:
        """Whether some pass sees slots that an earlier one fed."""
        return not all(torch.equal(forward.rows, torch.arange(forward.prefix)) for forward in self.forwards)

    @cached_property
    def sees_unwritten(self) -> bool:
        """Whether some pass attends over cache rows that none has written yet, hidden by its mask."""
        if self.policy is not None:
            return True
        written = torch.zeros(self.num_rows, dtype=torch.bool)
        for forward in self.forwards:
            written[forward.rows] = True
            if not bool(written[: forward.prefix].all()):
                return True
        return False

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
        names = ["kind", "source", "position", "target", "level_q", "level_k", "reads"]
        if not (self.any_order and other.any_order):
            names.append("order")
        sizes = ("grid", "num_condition", "num_heads", "num_learned", "any_order")
        alike = (self.masking is None) == (other.masking is None)
        return (
            alike
            and all(getattr(self, name) == getattr(other, name) for name in sizes)
            and all(torch.equal(getattr(self, name), getattr(other, name)) for name in names)
        )

    def decided_before(self) -> list[int]:
        """Number of tokens decided before each pass."""
        counts, total = [], self.num_known
        for forward in self.forwards:
            counts.append(total)
            total += len(forward.targets)
        return counts

    def step_of(self) -> Tensor:
        """Pass that decides each raster position, int64 [N]; -1 where the token is given."""
        step = torch.full((self.num_tokens,), -1)
        for index, forward in enumerate(self.forwards):
            step[self.order[forward.targets]] = index
        return step


@dataclass(frozen=True, eq=False)
class DevicePlan:
    """What teacher forcing and the decoding loop read from a plan, on one device.

    Attributes:
        order: int64 [N].
        feed: inputs of the whole teacher-forced sequence.
        read: read-out of all N targets in RASTER order, for the plan's own order.
        read_in_order: read-out of all N targets in the order of decoding, for orders drawn per sample.
        causal: the visibility is lower triangular, so no mask tensor is needed.
        mask: bool [S, S], or None when causal or when everything is visible.
        forwards: the passes.
        level_q: int64 [S].
        level_k: int64 [S].
    """

    order: Tensor
    feed: Feed
    read: Read
    read_in_order: Read
    causal: bool
    mask: Tensor | None
    forwards: tuple[Forward, ...]
    level_q: Tensor
    level_k: Tensor

    @cached_property
    def blocks(self) -> "BlockMask":
        """The visibility as a block mask for FlexAttention, any batch and number of heads."""
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return self.level_k[key] <= self.level_q[query]

        slots = len(self.level_q)
        with torch.inference_mode(False):
            return create_block_mask(visible, None, None, slots, slots, device=self.level_q.device)

    @staticmethod
    def build(plan: Plan, device: torch.device) -> "DevicePlan":
        """Render a plan on a device."""
        visible = plan.visible()
        causal = torch.equal(visible, torch.ones_like(visible).tril())
        reads = plan.reads.clone()
        reads[:, 2] = plan.order[plan.reads[:, 2]]
        return DevicePlan(
            order=plan.order.to(device),
            feed=Feed.build(torch.arange(plan.num_slots), plan.kind, plan.source, plan.position, plan.target).to(
                device
            ),
            read=Read.build(reads, plan.num_tokens, plan.num_heads).to(device),
            read_in_order=Read.build(plan.reads, plan.num_tokens, plan.num_heads).to(device),
            causal=causal,
            mask=None if causal or bool(visible.all()) else visible.to(device),
            forwards=tuple(forward.to(device) for forward in plan.forwards),
            level_q=plan.level_q.to(device),
            level_k=plan.level_k.to(device),
        )
