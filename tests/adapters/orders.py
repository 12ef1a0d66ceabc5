"""What the adapters of the decode orders share: building networks, guidance ranges, traced greedy decoding."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from adapters import EXACT, Case, Check, Tolerance, UnknownCase, compare_manifest, count_parameters
from torch import Tensor

from vgen.checkpoints.convert import StateDict
from vgen.generators.conditioning import ClassCondition, TextCondition
from vgen.generators.transformer import Transformer
from vgen.layers.cache import KVCache
from vgen.sampling.decode import decode
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.plan import Plan

CONFIGS = Path(__file__).parents[2] / "configs"
GRADIENTS = Tolerance(1e-4, 1e-3)
SCALARS = Tolerance(1e-5, 1e-5)


def build(config: Mapping[str, Any], plan: Plan) -> Transformer:
    """Our network for the original's configuration (names of LlamaGen's ModelArgs) and an order, without dropout."""
    condition: ClassCondition | TextCondition
    if config.get("model_type", "c2i") == "t2i":
        condition = TextCondition(
            caption_dim=config["caption_dim"], num_slots=config["cls_token_num"], dim=config["dim"]
        )
    else:
        condition = ClassCondition(num_classes=config["num_classes"], dim=config["dim"])
    return Transformer(
        vocab_size=config["vocab_size"],
        grid=plan.grid,
        condition=condition,
        dim=config["dim"],
        depth=config["n_layer"],
        heads=config["n_head"],
        kv_heads=config.get("n_kv_head"),
        ffn_multiplier=config.get("ffn_dim_multiplier"),
        ffn_multiple_of=config.get("multiple_of", 256),
        norm_eps=config.get("norm_eps", 1e-5),
        rope_base=config.get("rope_base", 10000),
        token_dropout=0.0,
        residual_dropout=0.0,
        ffn_dropout=0.0,
        num_readouts=plan.num_heads,
        num_learned=plan.num_learned,
        position_queries=plan.has_queries,
    )


def check_preset(
    case: Case,
    config: Mapping[str, Any],
    plan: Plan,
    to_ours: Callable[[StateDict], StateDict],
    to_published: Callable[[StateDict], StateDict],
) -> list[Check]:
    """Our preset of the stated size, on the meta device, has exactly the published names and shapes."""
    shape = (config["dim"], config["n_layer"], config["n_head"])
    presets = [yaml.safe_load(path.read_text()) for path in sorted((CONFIGS / "generator").glob("*.yaml"))]
    found = [p for p in presets if (p.get("dim"), p.get("depth"), p.get("heads")) == shape]
    if not found:
        raise UnknownCase(f"no preset under configs/generator has (dim, depth, heads) = {shape}")
    sizes = {"dim": found[0]["dim"], "n_layer": found[0]["depth"], "n_head": found[0]["heads"]}
    with torch.device("meta"):
        generator = build({**config, **sizes, "n_kv_head": found[0].get("kv_heads")}, plan)
    ours = generator.state_dict()
    parameters = count_parameters(generator)
    checks = compare_manifest(case, to_published(ours), parameters)
    if "__params__" in case.data:
        checks.append(same("parameters", parameters, case.data["__params__"]))
    back = to_ours(to_published(ours))
    return [*checks, Check("round trip", 0.0, list(back) == list(ours), "names do not survive the round trip")]


@dataclass(frozen=True)
class RangeGuidance(Guidance):
    """Guidance in several ranges of the number of tokens decided before a pass."""

    ranges: tuple[tuple[int, int], ...] = ()

    def weight(self, decided: int, total: int) -> float:
        inside = any(start <= decided < end for start, end in self.ranges)
        return super().weight(decided, total) if inside else 1.0


def guidance_of(scale: float, ranges: list[tuple[int, int]] | None) -> Guidance:
    """Constant guidance inside ranges [start, end) of tokens decided; None = always.

    The originals count tokens anew in every stage, which one (start, end) cannot say if the stages leave a gap.
    """
    if ranges is None:
        return Guidance(scale=scale)
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    if len(merged) == 1:
        return Guidance(scale=scale, start=merged[0][0], end=merged[0][1])
    return RangeGuidance(scale=scale, ranges=tuple(merged))


@dataclass(frozen=True)
class Trace:
    """A greedy decode: tokens int64 [B, N] and guided logits [B, N, V] in raster order, and the cache it left."""

    tokens: Tensor
    logits: Tensor
    cache: KVCache


def greedy(
    generator: Transformer,
    plan: Plan,
    condition: Tensor,
    guidance: Guidance,
    *,
    padding: Tensor | None = None,
    forced: Tensor | None = None,
    order: Tensor | None = None,
) -> Trace:
    """Decode greedily, in an order per sample if given; ``forced`` int64 [B, N] replaces every token decided."""
    logits = torch.zeros(len(condition), plan.num_tokens, generator.vocab_size)
    places = plan.order.expand(len(condition), -1) if order is None else order
    caches: list[KVCache] = []

    def new_cache(batch: int, rows: int) -> KVCache:
        caches.append(Transformer.new_cache(generator, batch, rows))
        return caches[-1]

    def trace(index: int, guided: Tensor) -> None:
        positions = places[:, plan.forwards[index].targets]
        logits.scatter_(1, positions[:, :, None].expand_as(guided), guided)

    with mock.patch.object(generator, "new_cache", new_cache):
        tokens = decode(
            generator,
            plan,
            condition,
            sampling=Sampling(greedy=True, guidance=guidance),
            sample_index=torch.arange(len(condition)),
            padding=padding,
            known_ids=forced,
            known=None if forced is None else torch.ones_like(forced, dtype=torch.bool),
            order=order,
            trace=trace,
        )
    return Trace(tokens, logits, caches[0])


def branches(
    generator: Transformer, plan: Plan, tokens: Tensor, condition: Tensor, padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Teacher-forced conditional and unconditional logits [B, N, V] in raster order."""
    drop = torch.ones(len(tokens), dtype=torch.bool)
    with torch.inference_mode():
        conditional = generator.logits(tokens, condition, plan, padding=padding)
        return conditional, generator.logits(tokens, condition, plan, drop=drop, padding=padding)


def compare_gradients(
    case: Case, generator: Transformer, loss: Tensor, to_published: Callable[[StateDict], StateDict]
) -> list[Check]:
    """Compare every out.grad.* with the gradient of the loss."""
    names = [name.removeprefix("grad.") for name in case.outputs if name.startswith("grad.")]
    if not names:
        return []
    loss.backward()
    gradients = to_published({name: p.grad for name, p in generator.named_parameters() if p.grad is not None})
    tolerance = case.tolerance("grad", default=GRADIENTS)
    tolerance = GRADIENTS if tolerance == EXACT else tolerance
    return [case.compare(f"grad.{name}", gradients[name], tolerance) for name in names]


def same(name: str, got: Any, want: Any) -> Check:
    """Exact comparison of plain values."""
    return Check(name, float(got != want), got == want, "" if got == want else f"{got} instead of {want}"[:200])


def sides_of(value: int | list[int]) -> tuple[int, ...]:
    """A grid given as one side or as a list of sides."""
    return (value, value) if isinstance(value, int) else tuple(value)


def option(case: Case, name: str, default: float) -> float:
    """A sampling option: a key of the case, or an argument of the call that its reference sentence quotes."""
    for place in (case.data, case.config):
        if place.get(name) is not None:
            return float(place[name])
    match = re.search(rf"\b{name}=(-?[\d.]+)", case.data.get("reference", ""))
    return float(match[1]) if match else default
