"""Properties that every plan must have: asked before a training, and by the tests for each order."""

import torch

from vgen.errors import UserError
from vgen.schedules.plan import Kind, Plan


class ContractError(UserError):
    """A schedule makes a plan that cannot be trained or decoded as it claims."""


def check_plan(plan: Plan) -> None:
    """Verify a plan.

    Raises:
        ContractError: naming the schedule and the first property that fails.
    """
    try:
        _check_properties(plan)
    except AssertionError as error:
        raise ContractError(
            f"schedule '{plan.name}' breaks the contract of plans (vgen/schedules/plan.py): {error}"
        ) from error


def _check_properties(plan: Plan) -> None:
    tokens = plan.num_tokens
    assert torch.equal(plan.order.sort().values, torch.arange(tokens)), "order is not a bijection onto the grid"
    _check_slots(plan)
    step = _check_decisions(plan)
    _check_feeding(plan, step)
    if plan.exact:
        _check_no_leak(plan, step)
        _check_same_context(plan)


def _check_slots(plan: Plan) -> None:
    for name in ("source", "position", "target", "level_q", "level_k"):
        assert len(getattr(plan, name)) == plan.num_slots, f"{name} has another length than kind"
    limits = {
        Kind.CONDITION: plan.num_condition,
        Kind.TOKEN: plan.num_tokens,
        Kind.LEARNED: plan.num_learned,
        Kind.QUERY: plan.num_tokens,
    }
    for kind, limit in limits.items():
        source = plan.source[plan.kind == kind]
        assert not len(source) or (source.min() >= 0 and source.max() < limit), f"source out of range for {kind.name}"
    assert plan.position.max() < plan.num_tokens, "position out of range"
    assert plan.target.max() < plan.num_tokens, "target out of range"
    assert plan.reads[:, 1].max() < plan.num_heads, "read of a head the plan does not declare"
    assert plan.visible().diagonal().all(), "a slot does not see itself"
    read_slots = set(plan.reads[:, 0].tolist())
    fed = {int(slot) for forward in plan.forwards for slot in forward.slots}
    assert read_slots <= fed, "a read slot is never fed"
    if plan.any_order:
        single = bool((torch.bincount(plan.reads[:, 2]) == 1).all()) and plan.num_heads == 1
        assert single, "an order that may be drawn per sample needs one read per token"


def _check_decisions(plan: Plan) -> torch.Tensor:
    """Every order index is given or decided exactly once; returns the pass that decides it, -1 where given."""
    step = torch.full((plan.num_tokens,), -2)
    step[: plan.num_known] = -1
    for index, forward in enumerate(plan.forwards):
        assert (step[forward.targets] == -2).all(), "a token is decided twice, or given and decided"
        step[forward.targets] = index
    assert (step >= -1).all(), "a token is never decided"
    return step


def _check_feeding(plan: Plan, step: torch.Tensor) -> None:
    """No token is fed before it is known, and no row is read before it is written."""
    written = torch.zeros(plan.num_rows, dtype=torch.bool)
    for index, forward in enumerate(plan.forwards):
        if plan.masking is None:
            assert (step[forward.feed.tokens] < index).all(), "a token is fed before it is decided"
        assert forward.settled <= int(forward.rows.min()), "a row is called settled in the pass that writes it"
        written[forward.rows] = True
        seen = torch.zeros(plan.num_rows, dtype=torch.bool)
        seen[: forward.prefix] = True if forward.mask is None else forward.mask.any(0)
        assert not plan.exact or not (seen & ~written).any(), "a cache row is read before it is written"


def _check_no_leak(plan: Plan, step: torch.Tensor) -> None:
    """In the teacher-forced sequence no read sees a token decided by its own or a later pass, however indirectly."""
    is_token = plan.kind == Kind.TOKEN
    token_step = torch.full((plan.num_slots,), -1)
    token_step[is_token] = step[plan.source[is_token]]
    visible = plan.visible()
    reach = visible.clone()
    while True:
        wider = (reach.float() @ visible.float()) > 0
        if torch.equal(wider | reach, reach):
            break
        reach |= wider
    for slot, _, target in plan.reads.tolist():
        if target < plan.num_known:
            continue
        latest = token_step[reach[slot]].max()
        assert latest < step[target], (
            f"slot {slot} sees a token of pass {int(latest)} but predicts one of {step[target]}"
        )


def _check_same_context(plan: Plan) -> None:
    """Every pass sees through the cache exactly the slots that the teacher-forced mask shows."""
    occupant = torch.full((plan.num_rows,), -1)
    visible = plan.visible()
    for forward in plan.forwards:
        occupant[forward.rows] = forward.slots
        for index, slot in enumerate(forward.slots.tolist()):
            rows = occupant[: forward.prefix]
            cached = rows if forward.mask is None else rows[forward.mask[index]]
            assert set(cached.tolist()) == set(visible[slot].nonzero().flatten().tolist()), (
                f"slot {slot} sees other slots"
            )
