"""Properties of every order under configs/schedule; a new order is covered by adding its YAML file."""

import ast
from dataclasses import replace

import pytest
import torch

from tests.generators.helpers import tiny_generator
from tests.paths import ROOT
from tests.schedules.helpers import GRIDS, ORDERS, plans, random_grids
from vgen.sampling.decode import decode
from vgen.sampling.settings import Sampling
from vgen.schedules.check import ContractError, check_plan

VOCAB = 23
every_order = pytest.mark.parametrize("name", ORDERS)


def traced_decode(generator, plan, labels, **options):
    """Greedy ids [B, N] and the logits [B, N, V] they were taken from, raster order."""
    logits = torch.zeros(len(labels), plan.num_tokens, VOCAB)
    order = options.get("order")
    order = plan.order.expand(len(labels), -1) if order is None else order

    def trace(index, guided):
        places = order[:, plan.forwards[index].targets]
        logits.scatter_(1, places[:, :, None].expand_as(guided), guided)

    ids = decode(
        generator,
        plan,
        labels,
        sampling=Sampling(greedy=True),
        sample_index=torch.arange(len(labels)),
        trace=trace,
        **options,
    )
    return ids, logits


def random_orders(plan, count):
    """Orders int64 [count, N], one per sample."""
    return torch.rand(count, plan.num_tokens, generator=torch.Generator().manual_seed(3)).argsort(1)


def test_the_orders_are_found():
    assert len(ORDERS) >= 7


@every_order
def test_an_order_accepts_square_and_other_grids(name):
    grids = {plan.grid for plan in plans(name)}
    assert (4, 4) in grids
    assert any(len(grid) == 2 and grid[0] != grid[1] and min(grid) > 1 for grid in grids)


@every_order
@pytest.mark.parametrize(("num_condition", "random"), [(1, 25), (3, 8)])
def test_the_contract_holds(name, num_condition, random):
    for plan in plans(name, GRIDS + random_grids(random), num_condition=num_condition):
        check_plan(plan)


@every_order
def test_cached_decoding_equals_teacher_forcing(name):
    for plan in plans(name, [(5,), (1, 4), (4, 4), (3, 5), (4, 6), (2, 3, 4), (2, 4, 4)]):
        if plan.exact:
            generator, labels = tiny_generator(plan, vocab_size=VOCAB), torch.tensor([0, 3])
            order = random_orders(plan, len(labels)) if plan.shuffled else None
            ids, logits = traced_decode(generator, plan, labels, order=order)
            with torch.inference_mode():
                forced = generator.logits(ids, labels, plan, order=order)
            torch.testing.assert_close(logits, forced, atol=1e-5, rtol=1e-5)
            assert torch.equal(forced.argmax(-1), ids)


@every_order
def test_training_logits_depend_only_on_tokens_of_earlier_passes(name):
    for plan in plans(name, [(4, 4), (2, 6), (2, 2, 4)]):
        if plan.exact:
            generator, total = tiny_generator(plan, vocab_size=VOCAB), plan.num_tokens
            ids = torch.randint(VOCAB, (1, total)).repeat(total + 1, 1)
            each = torch.arange(total)
            ids[each, each] = (ids[each, each] + 1) % VOCAB
            with torch.inference_mode():
                logits = generator.logits(ids, torch.zeros(total + 1, dtype=torch.int64), plan)
            changed = (logits[:-1] - logits[-1]).abs().amax(-1) > 1e-5
            step = plan.step_of()
            assert not (changed & (step[None, :] <= step[:, None])).any()
            assert changed[step < step.max()].any(1).all(), "some token is seen by nobody"


@every_order
def test_decoding_logits_depend_only_on_tokens_of_earlier_passes(name):
    for plan in plans(name, [(4, 4), (2, 6), (4, 10)]):
        if plan.masking is not None or plan.policy is not None:
            # Given tokens are seen from the first pass on; what such an order sees is tested beside it.
            continue
        generator, total = tiny_generator(plan, vocab_size=VOCAB), plan.num_tokens
        ids = torch.randint(VOCAB, (1, total)).repeat(total + 1, 1)
        each = torch.arange(total)
        ids[each, each] = (ids[each, each] + 1) % VOCAB
        labels, known = torch.zeros(total + 1, dtype=torch.int64), torch.ones_like(ids, dtype=torch.bool)
        options = {"order": plan.order.expand(total + 1, -1)} if plan.any_order else {}
        _, logits = traced_decode(generator, plan, labels, known_ids=ids, known=known, **options)
        changed = (logits[:-1] - logits[-1]).abs().amax(-1) > 1e-5
        step = plan.step_of()
        assert not (changed & (step[None, :] <= step[:, None])).any()


@every_order
def test_passes_of_exact_orders_write_without_gaps_and_need_no_mask_but_a_causal_one(name):
    for plan in plans(name):
        for forward in plan.forwards[1:] if plan.exact else ():
            assert forward.row_start >= 0
            ends = torch.arange(forward.prefix - len(forward.rows), forward.prefix)[:, None]
            causal = torch.arange(forward.prefix)[None, :] <= ends
            assert forward.mask is None or torch.equal(forward.mask, causal)


@every_order
def test_the_check_notices_broken_plans(name):
    plan = plans(name, [(4, 4)])[0]
    last = plan.forwards[-1]
    broken = {
        "not a bijection": replace(plan, order=plan.order.clone().fill_(0)),
        "never": replace(plan, forwards=plan.forwards[:-1]),
        "decided twice": replace(plan, forwards=(*plan.forwards, last)),
        "does not see itself": replace(plan, level_q=plan.level_q - 1),
        "called settled": replace(plan, forwards=(*plan.forwards[:-1], replace(last, settled=plan.num_rows))),
    }
    if plan.masking is None:
        swapped = (plan.forwards[0], last, *plan.forwards[1:-1])
        broken["before it is decided"] = replace(plan, forwards=swapped)
    if plan.exact:
        broken["sees a token"] = replace(plan, level_q=torch.full_like(plan.level_q, int(plan.level_k.max())))
    for message, wrong in broken.items():
        with pytest.raises(ContractError, match=f"'{plan.name}'.*{message}"):
            check_plan(wrong)


def test_no_file_outside_the_schedules_branches_on_an_order():
    files = [*(ROOT / "vgen").rglob("*.py"), *ROOT.glob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        if "schedules" not in path.parts
        for line in branches_on_an_order(path.read_text())
    ]
    assert not found


def test_the_search_for_branches_finds_them():
    assert branches_on_an_order('if plan.name == "anything": pass') == [1]
    assert branches_on_an_order(f'if schedule in ("{ORDERS[0]}", "x"): pass') == [1]
    assert branches_on_an_order(f'match order_name:\n    case "{ORDERS[0]}":\n        pass') == [2]
    assert branches_on_an_order("from vgen.schedules.raster import raster") == [1]
    assert branches_on_an_order('print(f"schedule {plan.name}")\nif kind == "random": pass') == []


def branches_on_an_order(source):
    """Lines that compare the name of an order or import one order."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            text = ast.unparse(node)
            constants = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
            about = any(word in text.lower() for word in ("plan", "schedule", "order"))
            if "plan.name" in text or (about and constants & set(ORDERS)):
                lines.add(node.lineno)
        elif isinstance(node, ast.match_case):
            constants = {c.value for c in ast.walk(node.pattern) if isinstance(c, ast.Constant)}
            if constants & set(ORDERS):
                lines.add(node.pattern.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module in {f"vgen.schedules.{name}" for name in ORDERS}:
            lines.add(node.lineno)
    return sorted(lines)
