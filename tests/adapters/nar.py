"""Golden cases of NAR: image and video models, masks, orders and filters."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from adapters import EXACT, Case, Check, Tolerance, UnknownCase, compare_all
from adapters.orders import branches, build, check_preset, compare_gradients, greedy, guidance_of, option, same
from adapters.video_generators import check_video_preset, condition_of, network
from torch import Tensor

from vgen.checkpoints.convert import load_strict
from vgen.checkpoints.nar import to_ours, to_published, video_plan_of
from vgen.generators.transformer import Transformer, mask_padding
from vgen.losses.tokens import token_cross_entropy
from vgen.sampling.filters import filter_logits
from vgen.schedules.neighboring import neighboring
from vgen.schedules.plan import Kind, Plan

FORWARD, DECODED, FILTERS = Tolerance(2e-4, 1e-4), Tolerance(5e-4, 1e-4), Tolerance(1e-6, 1e-6)


def run(case: Case) -> list[Check]:
    """Find out what a case is from its content and run it."""
    for known, runner in RUNNERS:
        if known(case):
            return runner(case)
    raise UnknownCase("neither a manifest, tables, a filter, a forward pass nor a generation of NAR")


def run_video_manifest(case: Case) -> list[Check]:
    """A published size of a video model."""
    config = case.data["__config__"]
    return check_video_preset(case, config, video_plan_of(config), "nar_video", to_ours, to_published)


def run_manifest(case: Case) -> list[Check]:
    """A published size, class- or text-conditional."""
    config = {"num_classes": 1000, "model_type": "c2i", "cls_token_num": 1, **case.data["__config__"]}
    side = math.isqrt(config["block_size"])
    plan = neighboring(grid=config.get("grid", (side, side)), num_condition=config["cls_token_num"])
    return check_preset(case, config, plan, to_ours, to_published)


# Masks and orders


def with_last_token(plan: Plan) -> Plan:
    """The original feeds all N tokens in training; the last one's outputs are unused, so our plans leave it out."""
    last = torch.tensor([plan.num_tokens - 1])
    level = plan.level_q.max()[None] + 1
    return replace(
        plan,
        kind=torch.cat([plan.kind, torch.tensor([Kind.TOKEN])]),
        source=torch.cat([plan.source, last]),
        position=torch.cat([plan.position, last]),
        target=torch.cat([plan.target, -torch.ones_like(last)]),
        level_q=torch.cat([plan.level_q, level]),
        level_k=torch.cat([plan.level_k, level]),
    )


def raster_slots(plan: Plan) -> Tensor:
    """Slot of every position of the original's sequence: the condition, then the tokens in raster order."""
    condition = torch.arange(plan.num_condition)
    return torch.cat([condition, plan.num_condition + plan.order.argsort()])


def run_tables(case: Case) -> list[Check]:
    """Full masks in raster order and frontier orders, of square pictures (g) and of any grid."""
    checks = []
    for name, want in case.outputs.items():
        kind, sides, condition = _table(name)
        plan = neighboring(grid=sides, num_condition=condition)
        if kind.startswith("mask"):
            slots = raster_slots(plan)
            mask = with_last_token(plan).visible()[slots][:, slots]
            got = _pack(mask) if kind == "mask_packed" else mask
            checks.append(case.compare(name, got.to(want.dtype), EXACT))
        elif kind == "frontier_order":
            checks.append(case.compare(name, plan.order, EXACT))
        else:
            sizes = [len(forward.targets) for forward in plan.forwards]
            checks.append(case.compare(name, torch.tensor([0, *sizes]).cumsum(0), EXACT))
    return checks


def _table(name: str) -> tuple[str, tuple[int, ...], int]:
    """Kind, grid and number of condition slots of names such as mask_g6_c5, mask_h2_w3_c1 or mask_packed_2x3x4."""
    kind = re.match(r"mask_packed|mask|frontier_order|frontier_offsets", name)
    slots = re.search(r"_c(\d+)", name)
    sides = tuple(int(side) for side in re.findall(r"\d+", re.sub(r"_c\d+", "", name)))
    if not kind or not sides:
        raise UnknownCase(f"a table named {name}")
    return kind[0], sides * 2 if len(sides) == 1 else sides, int(slots[1]) if slots else 1


def _pack(mask: Tensor) -> Tensor:
    """Bits of a flattened mask, most significant first."""
    import numpy as np

    return torch.from_numpy(np.packbits(mask.flatten().numpy()))


def run_filters(case: Case) -> list[Check]:
    """Temperature, top-k and top-p, named by their values."""
    checks = []
    for name in case.outputs:
        match = re.fullmatch(r"(filtered|probs)(?:_t([\d.]+))?_k(\d+)_p([\d.]+)", name)
        if not match:
            raise UnknownCase(f"a filter named {name}")
        got = filter_logits(
            case.inputs["logits"], temperature=float(match[2] or 1), top_k=int(match[3]), top_p=float(match[4])
        )
        checks.append(case.compare(name, got if match[1] == "filtered" else got.softmax(-1), FILTERS))
    return checks


# Networks


def _inputs(case: Case) -> tuple[Tensor, Tensor | None]:
    padding = case.inputs["emb_masks"].bool() if "emb_masks" in case.inputs else None
    return condition_of(case) if _is_video(case) else case.inputs["cond"], padding


def _is_video(case: Case) -> bool:
    return "abs_pe" in case.state


def _network(case: Case, grid: tuple[int, ...]) -> tuple[Transformer, Plan]:
    if _is_video(case):
        plan = video_plan_of(case.config)
        return network(case, plan, to_ours, last_position=True), plan
    plan = neighboring(grid=grid, num_condition=case.config.get("cls_token_num", 1))
    generator = build(case.config, plan)
    load_strict(generator, to_ours(case.state), what=case.name)
    return generator.eval(), plan


def _mask(plan: Plan, padding: Tensor | None, batch: int) -> Tensor:
    """What the original's sequence sees, bool [B, S, S]."""
    slots = raster_slots(plan)
    visible = with_last_token(plan).visible()[slots][:, slots]
    if padding is None:
        return visible.expand(batch, -1, -1)
    return mask_padding(visible, padding, torch.arange(len(slots)))[:, 0]


def _grid_of(case: Case) -> tuple[int, ...]:
    """The grid, stated or the one (of those with N cells) that the given mask belongs to."""
    if "latent_shape" in case.config:
        return tuple(case.config["latent_shape"])
    if "grid" in case.data:
        return tuple(case.data["grid"])
    condition, padding = _inputs(case)
    tokens, slots = case.inputs["idx"].shape[1], case.config.get("cls_token_num", 1)
    for height in sorted(range(1, tokens + 1), key=lambda side: abs(side - tokens / side)):
        grid = (height, tokens // height)
        if math.prod(grid) == tokens:
            plan = neighboring(grid=grid, num_condition=slots)
            if "mask" not in case.inputs or torch.equal(
                _mask(plan, padding, len(condition)), case.inputs["mask"].bool()
            ):
                return grid
    raise UnknownCase(f"in.mask belongs to no grid of {tokens} tokens")


def run_forward(case: Case) -> list[Check]:
    """Teacher forcing: mask, hidden states and logits of both heads everywhere, averaged logits, losses."""
    generator, plan = _network(case, _grid_of(case))
    ids, (condition, padding) = case.inputs["idx"], _inputs(case)
    mask = _mask(plan, padding, len(ids))
    checks = []
    if "mask" in case.inputs:
        checks.append(same("mask", torch.equal(mask, case.inputs["mask"].bool().expand_as(mask)), True))

    tensors, slots = with_last_token(plan).on(ids.device), raster_slots(plan)
    feed = tensors.feed
    visible = mask[:, slots.argsort()][:, :, slots.argsort()].unsqueeze(1)
    embedded, order = generator.condition(condition), tensors.order
    hidden = generator.run_blocks(*generator.enter(ids[:, order], embedded, feed, order, causal=False, mask=visible))
    got = {}
    for index, head in enumerate("RDB" if plan.num_heads == 3 else "RB"):
        state = hidden[index][:, slots]
        got[f"hidden_{head}"] = state
        got[f"logits_{head}"] = generator.outputs[index](generator.norms[index](state)).float()
    logits = generator.logits(ids, condition, plan, padding=padding)
    loss = token_cross_entropy(logits, ids)
    got |= {"logits": logits, "loss": loss}
    if "loss_valid" in case.outputs:
        got["loss_valid"] = token_cross_entropy(logits, ids, case.inputs["valid"])
    checks += compare_all(case, got, _tolerance(case, FORWARD))
    return checks + compare_gradients(case, generator, loss, to_published)


def _tolerance(case: Case, default: Tolerance) -> Tolerance:
    stated = case.data["tolerance"]
    if not isinstance(stated, dict):
        return case.tolerance("logits", default=default)
    return Tolerance(
        stated.get("logits_atol", stated.get("atol", default.atol)),
        stated.get("logits_rtol", stated.get("rtol", default.rtol)),
    )


def run_generate(case: Case) -> list[Check]:
    """Greedy decoding: fed positions and tokens of every pass, tokens, guided logits and both branches."""
    generator, plan = _network(case, _grid_of(case))
    condition, padding = _inputs(case)
    scale, interval = option(case, "cfg_scale", 1.0), int(option(case, "cfg_interval", -1))
    # The prefill is always guided; later passes while at most `interval` tokens are decided.
    guidance = guidance_of(scale if scale > 1 else 1.0, None if interval < 0 else [(0, interval + 1)])
    found = greedy(generator, plan, condition, guidance, padding=padding)
    tolerance = _tolerance(case, DECODED)
    conditional, unconditional = branches(generator, plan, found.tokens, condition, padding)
    floats = {"logits": found.logits, "cond_logits": conditional, "uncond_logits": unconditional}
    integers = {"tokens": found.tokens, "step_of_position": plan.step_of()}
    checks = compare_all(case, integers, EXACT) + compare_all(case, floats, tolerance)
    if "forward_count" in case.data:
        checks.append(same("forward_count", len(plan.forwards), case.data["forward_count"]))
    for index, step in enumerate(case.data["steps"]):
        checks += _passes(plan, index, step, found.tokens)
    return checks


def _passes(plan: Plan, index: int, step: dict[str, Any], tokens: Tensor) -> list[Check]:
    """What one pass of the original fed and decided."""
    forward = plan.forwards[index]
    raster = plan.order[forward.feed.tokens]
    fed = [*forward.feed.conditions.tolist(), *(plan.num_condition + raster).tolist()]
    checks = [
        same(f"pass {index} positions", fed, step["input_pos"]),
        same(f"pass {index} targets", plan.order[forward.targets].tolist(), step["target_raster"]),
    ]
    for name, cells in (("target_coordinates", plan.order[forward.targets]), ("input_coordinates", raster)):
        if step.get(name) is not None:
            ours = torch.stack(torch.unravel_index(cells, plan.grid), dim=1).tolist()
            checks.append(same(f"pass {index} {name}", ours, step[name]))
    if step["input_tokens"] is not None:
        ours = tokens[:, raster].tolist() * (step["batch"] // len(tokens))
        checks.append(same(f"pass {index} tokens", ours, step["input_tokens"]))
    return checks


RUNNERS: list[tuple[Callable[[Case], bool], Callable[[Case], list[Check]]]] = [
    (lambda c: "medusa_output.weight" in c.data, run_manifest),
    (lambda c: "output_R.weight" in c.data, run_video_manifest),
    (lambda c: any(name.startswith(("mask_", "frontier_")) for name in c.outputs), run_tables),
    (lambda c: "logits" in c.inputs and not c.state, run_filters),
    (lambda c: bool(c.state) and "idx" in c.inputs, run_forward),
    (lambda c: bool(c.state) and "steps" in c.data, run_generate),
]
