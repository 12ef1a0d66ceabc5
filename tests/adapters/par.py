"""Golden cases of PAR: orders, masks, rotary tables, training, decoding, the inferred video order, manifests."""

import math
import re
from collections.abc import Callable

import torch
from adapters import EXACT, Case, Check, Tolerance, UnknownCase, compare, compare_all
from adapters.orders import branches, build, check_preset, compare_gradients, greedy, guidance_of, same, sides_of
from torch import Tensor

from vgen.checkpoints.convert import load_strict
from vgen.checkpoints.par import to_ours, to_published
from vgen.generators.transformer import Transformer
from vgen.layers.rope import rope_table
from vgen.losses.tokens import token_cross_entropy
from vgen.schedules.parallel import parallel
from vgen.schedules.plan import Kind, Plan

TRAINED, DECODED = Tolerance(1e-4, 1e-5), Tolerance(2e-4, 1e-5)


def run(case: Case) -> list[Check]:
    """Find out what a case is from its content and run it."""
    for known, runner in RUNNERS:
        if known(case):
            return runner(case)
    raise UnknownCase("neither a manifest, tables, training, decoding nor an order of PAR")


def run_manifest(case: Case) -> list[Check]:
    """A published size; the number of regions follows from the transition embeddings."""
    config = case.data["__file__"]["config"]
    regions = case.manifest["spe_tok_embeddings.special_embeddings.weight"][0] + 1
    side = math.isqrt(config["block_size"])
    return check_preset(case, config, parallel(grid=(side, side), regions=regions), to_ours, to_published)


def run_video_order(case: Case) -> list[Check]:
    """Orders of T x H x W grids."""
    checks = []
    for name, stated in case.data.items():
        if isinstance(stated, dict) and "perm" in stated:
            plan = parallel(grid=stated["shape"], regions=stated["regions"])
            checks.append(same(f"{name} order", plan.order.tolist(), stated["perm"]))
            checks.append(same(f"{name} passes", len(plan.forwards), stated["num_forwards"]))
    return checks


# Tables. The original has n - 1 or n more slots than logits it uses; our plans leave them out, nobody sees them.


def run_tables(case: Case) -> list[Check]:
    """Orders, visibility and rotary rows, named by grid side, regions and head width."""
    checks = []
    for name, want in case.outputs.items():
        kind = re.match(r"visible_len_decode|visible_len|perm|inv|rope|mask", name)
        regions, width = re.search(r"_n(\d+)(?:x(\d+))?", name), re.search(r"_hd(\d+)", name)
        sides = [int(side) for side in re.findall(r"\d+", re.sub(r"_(n\d+(x\d+)?|hd\d+)", "", name))]
        if not kind or not regions or not sides:
            raise UnknownCase(f"a table named {name}")
        cuts = int(regions[1]) if regions[2] is None else [int(regions[1]), int(regions[2])]
        plan = parallel(grid=sides * 2 if len(sides) == 1 else sides, regions=cuts)
        checks += _table(kind[0], name, want, plan, int(width[1]) if width else 0)
    return checks


def _table(kind: str, name: str, want: Tensor, plan: Plan, head_dim: int) -> list[Check]:
    if kind == "perm":
        return [compare(name, plan.order, want, EXACT)]
    if kind == "inv":
        return [compare(name, plan.order.argsort(), want, EXACT)]
    if kind == "rope":
        return [_rope(name, plan, head_dim, want)]
    if kind == "mask":
        return _visibility(name, plan, want)
    if kind == "visible_len":
        return [compare(name, plan.visible().sum(1), want[: plan.num_slots], EXACT)]
    return [compare(name, _decoded_lengths(plan), want[: plan.num_slots], EXACT)]


def _rope(name: str, plan: Plan, head_dim: int, want: Tensor) -> Check:
    places = torch.cat([plan.order, torch.tensor([plan.num_tokens])])[plan.position]
    # A frequency's last float32 bit depends on the processor's power function; far rows multiply it.
    tolerance = Tolerance(1e-6 + max(plan.grid) * 2**-24, 0.0)
    return compare(name, rope_table(plan.grid, head_dim)[places], want[: plan.num_slots], tolerance)


def _visibility(name: str, plan: Plan, want: Tensor) -> list[Check]:
    kept = plan.num_slots
    unseen = not bool(want[:kept, kept:].any())
    mask = plan.visible().to(want.dtype)
    return [compare(name, mask, want[:kept, :kept], EXACT), same(f"{name}: left-out slots unseen", unseen, True)]


def _decoded_lengths(plan: Plan) -> Tensor:
    """Number of cache rows that each slot attends to when it is fed."""
    lengths = torch.zeros(plan.num_slots, dtype=torch.int64)
    for forward in plan.forwards:
        lengths[forward.slots] = forward.prefix if forward.mask is None else forward.mask.sum(1)
    return lengths


# Networks


def _network(case: Case) -> tuple[Transformer, Plan]:
    plan = parallel(grid=sides_of(case.config["grid"]), regions=case.config["n"])
    generator = build(case.config, plan)
    load_strict(generator, to_ours(case.state), what=case.name)
    return generator.eval(), plan


def run_train(case: Case) -> list[Check]:
    """Teacher forcing: order, mask, rotary rows, logits, losses, gradients."""
    generator, plan = _network(case)
    ids, labels = case.inputs["tokens_raster"], case.inputs["class_labels"]
    logits = generator.logits(ids, labels, plan)
    loss = token_cross_entropy(logits, ids)
    checks = compare_all(case, {"tokens_seq": ids[:, plan.order]}, EXACT)
    got = {"logits": logits[:, plan.order], "loss": loss.reshape(1)}
    if "loss_valid" in case.outputs:
        got["loss_valid"] = token_cross_entropy(logits, ids, case.inputs["valid"]).reshape(1)
    checks += compare_all(case, got, case.tolerance("logits", default=TRAINED))
    if "group_mask" in case.outputs:
        checks += _visibility("group_mask", plan, case.outputs["group_mask"])
    if "freqs_cis" in case.outputs:
        checks.append(_rope("freqs_cis", plan, generator.head_dim, case.outputs["freqs_cis"]))
    return checks + compare_gradients(case, generator, loss, to_published)


def run_generate(case: Case) -> list[Check]:
    """Greedy decoding: slots and contents fed, tokens, both branches, guided logits."""
    generator, plan = _network(case)
    labels = case.inputs["class_labels"]
    ranges = _guided_ranges(case)
    guidance = guidance_of(max(case.data["cfg_scale"], 1.0), ranges)
    found = greedy(generator, plan, labels, guidance)
    conditional, unconditional = branches(generator, plan, found.tokens, labels)
    # The original's flag, which it keeps even where the scale is 1.
    flag = guidance_of(2.0, ranges)
    applied = torch.zeros(plan.num_tokens, dtype=torch.int64)
    for forward, decided in zip(plan.forwards, plan.decided_before(), strict=True):
        applied[forward.targets] = int(flag.weight(decided, plan.num_tokens) == 2.0)
    both = [conditional, unconditional] if case.data["cfg_scale"] > 1 else [conditional]
    floats = {"logits_raw": torch.cat(both)[:, plan.order], "logits_used": found.logits[:, plan.order]}
    integers = {
        "tokens_seq": found.tokens[:, plan.order],
        "tokens_raster": found.tokens,
        "num_forwards": torch.tensor([len(plan.forwards)]),
        "input_pos": _padded([forward.slots.tolist() for forward in plan.forwards]),
        "fed_slot_ids_sample0": _padded(_fed_contents(plan, found.tokens[0])),
        "cfg_on": applied,
    }
    return compare_all(case, integers, EXACT) + compare_all(case, floats, case.tolerance("logits", default=DECODED))


def _guided_ranges(case: Case) -> list[tuple[int, int]] | None:
    """The original counts cfg_interval anew after the first token and after the one-by-one tokens."""
    interval, regions = case.data.get("cfg_interval", -1), case.config["n"]
    return None if interval < 0 else [(0, min(interval + 2, regions)), (regions, regions + interval + 1)]


def _padded(rows: list[list[int]]) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def _fed_contents(plan: Plan, tokens: Tensor) -> list[list[int]]:
    """Code ids, -2 for the class slot, -3 - k for transition embedding k."""
    codes = {
        Kind.CONDITION: lambda source: -2,
        Kind.TOKEN: lambda source: int(tokens[plan.order[source]]),
        Kind.LEARNED: lambda source: -3 - source,
    }
    slots = zip(plan.kind.tolist(), plan.source.tolist(), strict=True)
    contents = [codes[Kind(kind)](source) for kind, source in slots]
    return [[contents[slot] for slot in forward.slots.tolist()] for forward in plan.forwards]


RUNNERS: list[tuple[Callable[[Case], bool], Callable[[Case], list[Check]]]] = [
    (lambda c: "spe_tok_embeddings.special_embeddings.weight" in c.data, run_manifest),
    (lambda c: any(isinstance(v, dict) and "perm" in v for v in c.data.values()), run_video_order),
    (lambda c: not c.state and any(name.startswith(("perm_", "mask_", "rope_")) for name in c.outputs), run_tables),
    (lambda c: bool(c.state) and "tokens_raster" in c.inputs, run_train),
    (lambda c: bool(c.state) and "cfg_scale" in c.data, run_generate),
]
