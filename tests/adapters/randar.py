"""Golden cases of RandAR: step schedules, rotary tables, training in random orders, decoding, manifests."""

import math
import re
from collections.abc import Callable

import torch
from adapters import EXACT, Case, Check, Tolerance, UnknownCase, compare, compare_all
from adapters.orders import build, check_preset, compare_gradients, greedy, sides_of
from torch import Tensor

from vgen.checkpoints.convert import load_strict
from vgen.checkpoints.randar import to_ours, to_published
from vgen.generators.transformer import Transformer
from vgen.layers.rope import extrapolated_rope_table, rope_table
from vgen.losses.tokens import token_cross_entropy
from vgen.sampling.settings import Guidance
from vgen.schedules.plan import Plan
from vgen.schedules.randar import group_sizes, randar

TRAINED, DECODED, TABLES = Tolerance(1e-4, 1e-5), Tolerance(2e-4, 1e-5), Tolerance(2e-6, 0.0)


def run(case: Case) -> list[Check]:
    """Find out what a case is from its content and run it."""
    for known, runner in RUNNERS:
        if known(case):
            return runner(case)
    raise UnknownCase("neither a manifest, tables, training nor decoding of RandAR")


def run_manifest(case: Case) -> list[Check]:
    """A published size."""
    config = case.data["__file__"]["config"]
    side = math.isqrt(config["block_size"])
    return check_preset(case, config, randar(grid=(side, side)), to_ours, to_published)


def run_tables(case: Case) -> list[Check]:
    """Tokens per pass, rotary tables, extrapolated rotary tables."""
    checks = []
    for name, want in case.outputs.items():
        if match := re.fullmatch(r"schedule_N(\d+)_S(-?\d+)", name):
            tokens, steps = int(match[1]), int(match[2])
            sizes = group_sizes(tokens, None if steps < 0 else steps)
            checks.append(compare(name, torch.tensor(sizes), want, EXACT))
        elif match := re.fullmatch(r"rope_g(\d+)(?:x(\d+))?_hd(\d+)", name):
            table = rope_table((int(match[1]), int(match[2] or match[1])), int(match[3]))
            checks.append(compare(name, _class_first(table), want, TABLES))
        elif match := re.fullmatch(r"rope_extrap_g(\d+)(?:x(\d+))?_hd(\d+)_x(\d+)_ntk(\d+)", name):
            height, width, head_dim, factor, boundary = (int(part or match[1]) for part in match.groups())
            grid = (height // factor, width // factor)
            table = extrapolated_rope_table(grid, head_dim, factor=factor, boundary=boundary)
            checks.append(compare(name, _class_first(table), want, Tolerance(1e-5, 0.0)))
        else:
            raise UnknownCase(f"a table named {name}")
    return checks


def _class_first(table: Tensor) -> Tensor:
    """The original's tables begin with the row of slots without a place, ours end with it."""
    return torch.cat([table[-1:], table[:-1]])


def _network(case: Case, plan: Plan) -> Transformer:
    generator = build(case.config, plan)
    load_strict(generator, to_ours(case.state), what=case.name)
    return generator.eval()


def run_train(case: Case) -> list[Check]:
    """Teacher forcing in a given order per sample and in raster order: queries, logits, losses, gradients."""
    plan = randar(grid=sides_of(case.config["grid"]))
    generator, order = _network(case, plan), case.inputs["token_order"]
    ids, labels = case.inputs["tokens_raster"], case.inputs["class_labels"]
    tolerance = case.tolerance("logits", default=TRAINED)
    logits = generator.logits(ids, labels, plan, order=order)
    loss = token_cross_entropy(logits, ids)
    with torch.no_grad():
        raster = generator.logits(ids, labels, plan, order=torch.arange(plan.num_tokens).expand_as(order))
        got = {
            "logits": logits.gather(1, order[:, :, None].expand_as(logits)),
            "loss": loss.reshape(1),
            "position_instruction_tokens": generator.ask(order),
            "logits_rasterorder": raster,
            "loss_rasterorder": token_cross_entropy(raster, ids).reshape(1),
        }
    checks = compare_all(case, got, tolerance)
    if "freqs_cis" in case.outputs:
        checks.append(case.compare("freqs_cis", _class_first(generator.rotary.table), TABLES))
    return checks + compare_gradients(case, generator, loss, to_published)


def run_generate(case: Case) -> list[Check]:
    """Greedy decoding in a given order: cache rows, tokens per pass, tokens, both branches, guided logits."""
    grid, steps = sides_of(case.config["grid"]), case.data["num_inference_steps"]
    plan = randar(grid=grid, steps=None if steps < 0 else steps)
    generator, labels, order = _network(case, plan), case.inputs["class_labels"], case.inputs["token_order"]
    first, last = case.data["cfg_scales"]
    guided = last > 1
    guidance = Guidance(scale=last, initial=first, schedule="linear") if guided else Guidance()
    found = greedy(generator, plan, labels, guidance, order=order)

    scales = torch.zeros(plan.num_tokens)
    for forward, decided in zip(plan.forwards, plan.decided_before(), strict=True):
        scales[forward.targets] = first + (last - first) * decided / plan.num_tokens
    in_order = order[:, :, None].expand(-1, -1, generator.vocab_size)
    used = found.logits.gather(1, in_order)
    both = _raw_branches(generator, plan, found.tokens, labels, order, used, guided=guided)
    widest = max(len(forward.rows) for forward in plan.forwards)
    rows = [forward.rows.tolist() + [-1] * (widest - len(forward.rows)) for forward in plan.forwards]
    integers = {
        "tokens_raster": found.tokens,
        "tokens_in_order": found.tokens.gather(1, order),
        "query_counts": torch.tensor([len(forward.targets) for forward in plan.forwards]),
        "num_forwards": torch.tensor([len(plan.forwards)]),
        "input_pos": torch.tensor(rows),
    }
    checks = compare_all(case, integers, EXACT)
    checks += compare_all(case, {"cfg_per_token": scales}, Tolerance(1e-6, 1e-6))
    floats = {"logits_used": used, "logits_raw": both}
    return checks + compare_all(case, floats, case.tolerance("logits", default=DECODED))


def _raw_branches(
    generator: Transformer, plan: Plan, tokens: Tensor, labels: Tensor, order: Tensor, used: Tensor, *, guided: bool
) -> Tensor:
    """Logits of both branches in decoding order, from the loop: passes of several tokens have no teacher forcing.

    The null branch is the decode of the null class with the tokens forced.
    """
    if not guided:
        return used
    in_order = order[:, :, None].expand(-1, -1, generator.vocab_size)
    null = torch.full_like(labels, generator.condition.num_classes)
    traced = [
        greedy(generator, plan, condition, Guidance(), forced=tokens, order=order).logits.gather(1, in_order)
        for condition in (labels, null)
    ]
    return torch.cat(traced)


RUNNERS: list[tuple[Callable[[Case], bool], Callable[[Case], list[Check]]]] = [
    (lambda c: c.is_manifest and "pos_instruct_embeddings" in c.data, run_manifest),
    (lambda c: not c.state and any(n.startswith(("schedule_", "rope_")) for n in c.outputs), run_tables),
    (lambda c: bool(c.state) and "tokens_raster" in c.inputs, run_train),
    (lambda c: bool(c.state) and "token_order" in c.inputs and "cfg_scales" in c.data, run_generate),
]
