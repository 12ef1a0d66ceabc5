"""Golden cases of LARP's autoregressive generators; tests/adapters/larp.py hands them over."""

import torch
from adapters import EXACT, Case, Check, Tolerance, UnknownCase, compare_all
from adapters.orders import branches, greedy, guidance_of, option, same
from adapters.video_generators import check_video_preset, condition_of, network

from vgen.checkpoints.larp_ar import plan_of, to_ours, to_published
from vgen.losses.tokens import token_cross_entropy
from vgen.sampling.settings import Guidance
from vgen.schedules.plan import Plan

FORWARD, DECODED = Tolerance(2e-4, 1e-4), Tolerance(5e-4, 1e-4)


def is_generator(case: Case) -> bool:
    """Whether a case is about a generator."""
    return "n_layer" in (case.data.get("__config__") or case.config)


def run_generator(case: Case) -> list[Check]:
    """Find out what a generator's case is from its content and run it."""
    if case.is_manifest:
        config = case.data["__config__"]
        return check_video_preset(case, config, plan_of(config), "larp_ar", to_ours, to_published)
    if "idx" in case.inputs:
        return run_forward(case)
    if "tokens" in case.outputs:
        return run_generate(case)
    raise UnknownCase("neither a manifest, a forward pass nor a generation of LARP")


def _plan(case: Case) -> Plan:
    """The plan; the number of tokens is that of the case, which may be shorter than the table allows."""
    tokens = (case.inputs["idx"] if "idx" in case.inputs else case.outputs["tokens"]).shape[1]
    slots = 1 if case.inputs["cond"].dim() == 1 else case.inputs["cond"].shape[1]
    return plan_of({**case.config, "max_seq_len": tokens, "cls_token_num": slots})


def _tolerance(case: Case, default: Tolerance) -> Tolerance:
    stated = case.data.get("tolerance", {})
    return Tolerance(
        stated.get("logits_atol", stated.get("atol", default.atol)),
        stated.get("logits_rtol", stated.get("rtol", default.rtol)),
    )


@torch.no_grad()
def run_forward(case: Case) -> list[Check]:
    """Teacher forcing."""
    plan = _plan(case)
    generator = network(case, plan, to_ours, last_position=False)
    logits = generator.logits(case.inputs["idx"], condition_of(case), plan)
    got = {"logits": logits, "loss": token_cross_entropy(logits, case.inputs["idx"])}
    return compare_all(case, got, _tolerance(case, FORWARD))


def run_generate(case: Case) -> list[Check]:
    """Greedy decoding with guidance: tokens, logits, both branches, and what every pass was fed."""
    plan, condition = _plan(case), condition_of(case)
    generator = network(case, plan, to_ours, last_position=False)
    found = greedy(generator, plan, condition, _guidance(case))
    tolerance = _tolerance(case, DECODED)
    checks = compare_all(case, {"tokens": found.tokens}, EXACT)
    checks += compare_all(case, {"logits": found.logits}, tolerance)
    if {"cond_logits", "uncond_logits"} & case.outputs.keys():
        conditional, unconditional = branches(generator, plan, found.tokens, condition)
        checks += compare_all(case, {"cond_logits": conditional, "uncond_logits": unconditional}, tolerance)
    if "forward_count" in case.data:
        checks.append(same("forward_count", len(plan.forwards), case.data["forward_count"]))
    for index, step in enumerate(case.data.get("steps", ())):
        checks.append(same(f"pass {index} positions", plan.forwards[index].slots.tolist(), step["input_pos"]))
    return checks


def _guidance(case: Case) -> Guidance:
    """LARP turns guidance off for decode steps i > c: from the pass that starts with c + 2 tokens known."""
    scale, interval = option(case, "cfg_scale", 1.0), int(option(case, "cfg_interval", -1))
    return guidance_of(scale if scale > 1 else 1.0, None if interval < 0 else [(0, interval + 2)])
