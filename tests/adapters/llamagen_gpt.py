"""Golden cases of LlamaGen's GPT: logits, losses, gradients, guided greedy decoding, filters, manifests."""

import math
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from adapters import EXACT, Case, Check, Tolerance, UnknownCase
from adapters.orders import build, check_preset
from adapters.procedural import default_rule, parse_rule
from torch import Tensor

from vgen.checkpoints.convert import load_strict
from vgen.checkpoints.llamagen_gpt import to_ours, to_published
from vgen.generators.transformer import Transformer, mask_padding
from vgen.layers.rope import rotate
from vgen.losses.tokens import token_cross_entropy
from vgen.sampling.decode import decode
from vgen.sampling.filters import filter_logits
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.plan import Plan
from vgen.schedules.raster import raster

CONFIGS = Path(__file__).parents[2] / "configs"
LOGITS = Tolerance(2e-4, 1e-5)
GRADIENTS = Tolerance(1e-5, 1e-3)
SCALARS = Tolerance(1e-5, 1e-5)


def run_gpt(case: Case) -> list[Check]:
    """Dispatch on what the case holds."""
    if case.is_manifest and "tok_embeddings.weight" in case.data:
        return run_manifest(case)
    if "variants" in case.data and "logits" in case.inputs:
        return run_filters(case)
    if case.state and "idx" in case.inputs:
        return run_small(case)
    if "model" in case.config and "idx" in case.inputs:
        return run_full_size(case)
    raise UnknownCase("not a GPT, filter or GPT manifest case of LlamaGen")


def plan_of(config: dict[str, Any]) -> Plan:
    side = math.isqrt(config.get("block_size", 256))
    return raster(grid=(side, side), num_condition=config.get("cls_token_num", 1))


def preset(model: str) -> dict[str, Any]:
    """The original's configuration of a published size such as GPT-XL, from our preset file."""
    name = model.removeprefix("GPT-").lower()
    sizes = yaml.safe_load((CONFIGS / "generator" / f"{name}.yaml").read_text())
    theirs = {"dim": sizes["dim"], "n_layer": sizes["depth"], "n_head": sizes["heads"]}
    return {"vocab_size": 16384, "num_classes": 1000} | theirs


def run_small(case: Case) -> list[Check]:
    """A tiny network with stored weights, class- or text-conditional."""
    plan = plan_of(case.config)
    generator = build(case.config, plan)
    load_strict(generator, to_ours(case.state), what=case.name)
    ids = case.inputs["idx"]
    condition = case.inputs["labels"] if "labels" in case.inputs else case.inputs["caption"]
    padding = case.inputs["emb_mask"].bool() if "emb_mask" in case.inputs else None
    logits_tolerance = case.tolerance("logits", default=LOGITS)
    generator.train()
    logits = generator.logits(ids, condition, plan, padding=padding)
    loss = token_cross_entropy(logits, ids)
    checks = [
        case.compare("train_logits", logits, logits_tolerance),
        case.compare("train_loss", loss, SCALARS),
        case.compare("train_loss_valid", token_cross_entropy(logits, ids, case.inputs["valid"]), SCALARS),
    ]
    checks += compare_gradients(case, generator, loss)
    generator.eval()
    checks += compare_parts(case, generator, plan, condition, padding)
    if "eval_logits" in case.outputs:
        got = unsliced_logits(generator, plan, ids, condition, padding)
        checks.append(case.compare("eval_logits", got, logits_tolerance))
    for variant in case.data["generate_variants"]:
        checks += compare_generation(case, variant, generator, plan, condition, padding)
    return checks


def compare_gradients(case: Case, generator: Transformer, loss: Tensor) -> list[Check]:
    names = [name.removeprefix("grad.") for name in case.outputs if name.startswith("grad.")]
    if not names:
        return []
    loss.backward()
    gradients = to_published({name: p.grad for name, p in generator.named_parameters() if p.grad is not None})
    tolerance = case.tolerance("grad", default=GRADIENTS)
    return [case.compare(f"grad.{name}", gradients[name], tolerance) for name in names]


def compare_parts(
    case: Case, generator: Transformer, plan: Plan, condition: Tensor, padding: Tensor | None
) -> list[Check]:
    """Rotary table, rotation, embedded condition and mask."""
    checks = []
    tensors = plan.on(torch.device("cpu"))
    if "freqs_cis" in case.outputs:
        rope = generator.rotary.table
        table = torch.cat([rope[-1:].expand(plan.num_condition, -1, -1), rope[:-1]])
        checks.append(case.compare("freqs_cis", table, Tolerance(1e-6, 0.0)))
        if "rope_q" in case.outputs:
            got = rotate(case.inputs["rope_q"].transpose(1, 2), table).transpose(1, 2)
            checks.append(case.compare("rope_q", got, Tolerance(1e-5, 0.0)))
    for name, drop in (("embed", False), ("embed_forced", True)):
        for key in (f"label_{name}", f"caption_{name}"):
            if key in case.outputs:
                forced = case.inputs["force_drop_ids"].bool() if drop else None
                checks.append(case.compare(key, generator.condition(condition, forced), Tolerance(1e-6, 1e-5)))
    if "attn_mask" in case.outputs:
        assert padding is not None
        mask = mask_padding(plan.visible(), padding, torch.arange(plan.num_slots))[:, 0]
        checks.append(case.compare("attn_mask", mask.long(), EXACT))
    assert tensors.causal
    return checks


def unsliced_logits(
    generator: Transformer, plan: Plan, ids: Tensor, condition: Tensor, padding: Tensor | None
) -> Tensor:
    """Logits of every slot, condition slots included, as the original's eval mode returns them."""
    tensors = plan.on(ids.device)
    mask = plan.visible() if padding is None else mask_padding(plan.visible(), padding, torch.arange(plan.num_slots))
    embedded = generator.condition(condition)
    x, view = generator.enter(ids, embedded, tensors.feed, tensors.order, causal=False, mask=mask)
    return generator.outputs[0](generator.norms[0](generator.run_blocks(x, view)[0])).float()


def compare_generation(
    case: Case, variant: dict, generator: Transformer, plan: Plan, condition: Tensor, padding: Tensor | None
) -> list[Check]:
    """Greedy decoding with guidance; cfg_interval c guides the passes that start with at most c + 1 tokens known."""
    interval = variant.get("cfg_interval", -1)
    guidance = Guidance(scale=variant["cfg_scale"], end=None if interval < 0 else interval + 2)
    traced: list[Tensor] = []
    length = variant.get("max_new_tokens", plan.num_tokens)
    tokens = decode(
        generator,
        plan,
        condition,
        sampling=Sampling(greedy=True, guidance=guidance),
        sample_index=torch.arange(len(condition)),
        padding=padding if variant.get("emb_masks", True) else None,
        num_passes=length,
        trace=lambda _, logits: traced.append(logits[:, 0]),
    )
    tag = f"gen.{variant['tag']}"
    checks = [case.compare(f"{tag}.tokens", tokens[:, :length], EXACT)]
    tolerance = case.tolerance("logits", default=LOGITS)
    logits = torch.stack(traced)
    if f"{tag}.logits" in case.outputs:
        checks.append(case.compare(f"{tag}.logits", logits, tolerance))
    crop = f"{tag}.logits_crop"
    if crop in case.outputs:
        checks.append(case.compare(crop, logits[..., : case.outputs[crop].shape[-1]], tolerance))
    return checks


def run_full_size(case: Case) -> list[Check]:
    """A published size with weights made from a rule."""
    plan = plan_of(case.config)
    generator = build(preset(case.config["model"]), plan)
    shapes = {name: tuple(value.shape) for name, value in to_published(generator.state_dict()).items()}
    first, *later = case.data["weights"].split("; then ")
    gain, overrides = parse_rule(first)
    seed = case.data["seed"]
    state = {n: default_rule(n, shape, seed, gain=gain, overrides=overrides) for n, shape in shapes.items()}
    for sentence in later:
        name = sentence.split(" = ")[0].strip()
        state[name] = default_rule(name, shapes[name], seed, gain=parse_rule(sentence)[0])
    checks = []
    for name, want in case.outputs.items():
        if name.startswith("check."):
            got = state[name.removeprefix("check.")].flatten()[: want.numel()]
            checks.append(case.compare(name, got, Tolerance(1e-7, 0.0)))
    load_strict(generator.eval(), to_ours(state), what=case.name)
    prefix, labels = case.inputs["idx"], case.inputs["labels"]
    known = prefix.shape[1]
    ids = torch.zeros(len(prefix), plan.num_tokens, dtype=torch.int64)
    ids[:, :known] = prefix
    with torch.inference_mode():
        logits = generator.logits(ids, labels, plan)[:, : known + 1]
    tolerance = case.tolerance("logits", default=Tolerance(2e-3, 1e-5))
    nll = torch.nn.functional.cross_entropy(logits[:, :known].transpose(1, 2), prefix, reduction="none")
    crop = case.outputs["logits_crop"].shape[-1]
    checks += [
        case.compare("logits_crop", logits[..., :crop], tolerance),
        case.compare("logits_last", logits[:, -1], tolerance),
        case.compare("argmax", logits.argmax(-1), EXACT),
        case.compare("nll", nll, tolerance),
    ]
    for variant in case.data["generate_variants"]:
        checks += compare_generation(case, variant, generator, plan, labels, None)
    return checks


def run_filters(case: Case) -> list[Check]:
    """Temperature, top-k and top-p; minus infinity is stored as -1e30."""
    checks = []
    variants = {str(v["i"]): v for v in case.data["variants"]}
    for name in case.outputs:
        tag, what = name.rsplit(".", 1)
        tied = re.fullmatch(r"tie_k(\d+)", tag)
        if tied:
            filtered = filter_logits(case.inputs["logits_tie"], top_k=int(tied[1]))
        else:
            options = {key: variants[tag][key] for key in ("temperature", "top_k", "top_p")}
            filtered = filter_logits(case.inputs["logits"], **options)
        got = {
            "filtered": filtered.masked_fill(filtered.isinf(), -1e30),
            "probs": filtered.softmax(-1),
            "kept": filtered.isfinite().sum(-1),
        }[what]
        checks.append(case.compare(name, got, EXACT if what == "kept" else Tolerance(1e-6, 1e-6)))
    return checks


def run_manifest(case: Case) -> list[Check]:
    """Our preset on the meta device has exactly the published names and shapes."""
    stated = {"vocab_size": 16384, "num_classes": 1000} | case.data["__file__"]["config"]
    config = {**stated, "model_type": "t2i" if "caption_dim" in stated else "c2i", "block_size": 256}
    return check_preset(case, config, plan_of(config), to_ours, to_published)
