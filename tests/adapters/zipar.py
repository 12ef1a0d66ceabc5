"""Golden cases of ZipAR: the published decoder, cache semantics included, on LlamaGen networks."""

import re
from typing import Any

import torch
from adapters import EXACT, Case, Check, Tolerance, UnknownCase, compare
from adapters.orders import build, greedy, guidance_of, same
from torch import Tensor

from vgen.checkpoints.convert import load_strict
from vgen.checkpoints.llamagen_gpt import to_ours
from vgen.generators.transformer import Transformer
from vgen.sampling.settings import Guidance
from vgen.schedules.plan import Plan
from vgen.schedules.raster import raster
from vgen.schedules.zipar import zipar

LOGITS = Tolerance(2e-4, 1e-5)


def run(case: Case) -> list[Check]:
    """Every variant of a case shares one network."""
    if not case.state or "variants" not in case.data or "grid" not in case.data:
        raise UnknownCase("no network with ZipAR variants")
    grid, slots = tuple(case.data["grid"]), case.data["prompt_len"]
    trained = raster(grid=grid, num_condition=slots)
    generator = build(case.config, trained)
    load_strict(generator, to_ours(case.state), what=case.name)
    generator.eval()
    condition = case.inputs["labels"] if "labels" in case.inputs else case.inputs["caption"]
    padding = case.inputs["emb_mask"].bool() if "emb_mask" in case.inputs else None

    checks = []
    for name in case.outputs:
        match = re.fullmatch(r"raster_cfg([\d.]+)(?:_int(\d+))?\.tokens", name)
        if match:
            end = None if match[2] is None else int(match[2]) + 2
            guidance = Guidance(scale=float(match[1]), end=end)
            found = greedy(generator, trained, condition, guidance, padding=padding)
            checks.append(case.compare(name, found.tokens, EXACT))
    for variant in case.data["variants"]:
        plan = zipar(grid=grid, num_condition=slots, window=variant["window"], cache="original")
        checks += run_variant(case, variant, generator, plan, condition, padding)
    return checks


def _guidance(variant: dict[str, Any], width: int) -> Guidance:
    """The prefill is guided; the original counts cfg_interval in the first row and anew after it."""
    interval = variant.get("cfg_interval", -1)
    ranges = None if interval < 0 else [(0, min(interval + 2, width)), (width, width + interval + 1)]
    return guidance_of(max(variant["cfg_scale"], 1.0), ranges)


def run_variant(
    case: Case, variant: dict[str, Any], generator: Transformer, plan: Plan, condition: Tensor, padding: Tensor | None
) -> list[Check]:
    """Greedy decoding: positions and tokens fed and produced by every pass, guided logits, final caches."""
    tag, first = variant["tag"], plan.num_condition
    found = greedy(generator, plan, condition, _guidance(variant, plan.grid[1]), padding=padding)
    later = plan.forwards[1:]
    produced = torch.cat([forward.targets for forward in plan.forwards])
    fed = torch.cat([forward.feed.tokens for forward in later])
    integers = {
        "tokens": found.tokens,
        "step_of_position": plan.step_of(),
        "n_forward": torch.tensor(len(plan.forwards)),
        "fed_positions": torch.cat([first + forward.feed.position for forward in later]),
        "fed_count": torch.tensor([len(forward.feed.tokens) for forward in later]),
        "fed_tokens": found.tokens[:, fed],
        "new_positions": produced,
        "new_count": torch.tensor([len(forward.targets) for forward in plan.forwards]),
    }
    checks = [case.compare(f"{tag}.{n}", v, EXACT) for n, v in integers.items() if f"{tag}.{n}" in case.outputs]
    tolerance = case.tolerance("logits", default=LOGITS)
    checks.append(case.compare(f"{tag}.logits", found.logits[:, produced].transpose(0, 1), tolerance))
    if "forward_passes" in variant:
        checks.append(same(f"{tag} forward_passes", len(plan.forwards), variant["forward_passes"]))
    if "largest_set" in variant:
        checks.append(same(f"{tag} largest_set", max(len(f.targets) for f in later), variant["largest_set"]))
    return checks + _caches(case, variant, generator, plan, condition, padding, found.tokens)


def _caches(
    case: Case,
    variant: dict[str, Any],
    generator: Transformer,
    plan: Plan,
    condition: Tensor,
    padding: Tensor | None,
    tokens: Tensor,
) -> list[Check]:
    """Final caches; the original runs the null branch to the end, so it is forced along the decoded tokens."""
    names = {"k_cache_layer0": (0, 0), "v_cache_last": (-1, 1)}
    wanted = [name for name in names if f"{variant['tag']}.{name}" in case.outputs]
    if not wanted:
        return []
    scale = variant["cfg_scale"]
    cache = greedy(generator, plan, condition, Guidance(scale=max(scale, 1.0)), padding=padding, forced=tokens).cache
    checks = []
    for name in wanted:
        layer, part = names[name]
        want = case.outputs[f"{variant['tag']}.{name}"]
        ours = torch.zeros_like(want)
        ours[:, :, : plan.num_rows] = cache.buffer[layer, part]
        checks.append(compare(f"{variant['tag']}.{name}", ours, want, LOGITS))
    return checks
