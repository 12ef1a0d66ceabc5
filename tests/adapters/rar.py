"""Golden cases of RAR: logits in any order, partial sequences, decoding, schedules, manifests."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import yaml
from adapters import (
    EXACT,
    Case,
    Check,
    Tolerance,
    UnknownCase,
    compare,
    compare_all,
    compare_manifest,
    count_parameters,
)
from adapters.orders import CONFIGS, branches, compare_gradients, greedy, same
from torch import Tensor

from vgen.checkpoints.convert import load_strict
from vgen.checkpoints.rar import to_ours, to_published
from vgen.generators.conditioning import ClassCondition
from vgen.generators.transformer import Transformer
from vgen.layers.attention import View
from vgen.losses.tokens import token_accuracy, token_cross_entropy
from vgen.sampling.settings import Guidance
from vgen.schedules.plan import Kind, Plan, Read
from vgen.schedules.rar import rar
from vgen.training.optim import LrSchedule, decay_groups, without_decay

LOGITS = Tolerance(1e-5, 1e-4)
SCHEDULES = Tolerance(1e-6, 1e-5)


def run(case: Case) -> list[Check]:
    """Find out what a case is from its content and run it."""
    for known, runner in RUNNERS:
        if known(case):
            return runner(case)
    raise UnknownCase("neither a manifest, schedules, a forward pass nor decoding of RAR")


def build(config: Mapping[str, Any], grid: tuple[int, ...]) -> Transformer:
    """Our network for the original's configuration, with the switches of the shared preset and without dropout."""
    options = yaml.safe_load((CONFIGS / "generator" / "rar_base.yaml").read_text())
    dim = config["hidden_size"]
    condition = ClassCondition(num_classes=config["condition_num_classes"], dim=dim, num_prefix=1)
    switches = {name: value for name, value in options.items() if name not in ("_target_", "condition")}
    switches |= {name: 0.0 for name in switches if name.endswith("dropout")}
    switches |= {"dim": dim, "depth": config["num_hidden_layers"], "heads": config["num_attention_heads"]}
    switches["ffn_hidden"] = config["intermediate_size"]
    return Transformer(vocab_size=config["codebook_size"], grid=grid, condition=condition, **switches)


def _grid(tokens: int) -> tuple[int, ...]:
    """The network knows places by raster number only, so any shape of that many tokens will do."""
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else (tokens,)


def _network(case: Case) -> tuple[Transformer, Plan]:
    plan = rar(grid=_grid(case.config["image_seq_len"]), num_condition=2)
    generator = build(case.config, plan.grid)
    load_strict(generator, to_ours(case.state), what=case.name)
    return generator.eval(), plan


def run_manifest(case: Case) -> list[Check]:
    """Our preset of the stated width, on the meta device, has exactly the published names and shapes."""
    width = case.manifest["cls_token"][2]
    presets = [yaml.safe_load(path.read_text()) for path in sorted((CONFIGS / "generator").glob("rar_*.yaml"))]
    found = [preset for preset in presets if preset.get("dim") == width]
    if not found:
        raise UnknownCase(f"no preset configs/generator/rar_*.yaml has dim={width}")
    vocab = case.manifest["lm_head.bias"][0]
    config = {
        "hidden_size": width,
        "num_hidden_layers": found[0]["depth"],
        "num_attention_heads": found[0]["heads"],
        "intermediate_size": found[0]["ffn_hidden"],
        "codebook_size": vocab,
        "condition_num_classes": case.manifest["embeddings.weight"][0] - vocab - 2,
    }
    with torch.device("meta"):
        generator = build(config, _grid(case.manifest["pos_embed"][1] - 1024))
    ours = generator.state_dict()
    published = to_published(ours)
    parameters = sum(math.prod(shape) for shape in case.manifest.values())
    checks = compare_manifest(case, published, sum(value.numel() for value in published.values()))
    spare = parameters - count_parameters(generator)
    # One mask row, three tables with 1022, 1024 - 2 + 2 and 98 rows that no sequence reaches.
    checks.append(same("rows no sequence reaches", spare, (1 + 1022 + 1024 + 98) * width))
    return [*checks, Check("round trip", 0.0, set(to_ours(published)) == set(ours), "names do not survive")]


def _entered(
    generator: Transformer, plan: Plan, ids: Tensor, labels: Tensor, order: Tensor
) -> tuple[Tensor, View, Tensor]:
    """Input of the first block, what the blocks are told, and logits of every slot but the first.

    The original also feeds the last token; its logits are thrown away, but they are in the goldens.
    """
    last = torch.tensor([plan.num_tokens - 1])
    level = torch.tensor([plan.num_slots])
    longer = replace(
        plan,
        kind=torch.cat([plan.kind, torch.tensor([Kind.TOKEN])]),
        source=torch.cat([plan.source, last]),
        position=torch.cat([plan.position, last]),
        target=torch.cat([plan.target, torch.tensor([-1])]),
        level_q=torch.cat([plan.level_q, level]),
        level_k=torch.cat([plan.level_k, level]),
    )
    tensors, embedded = longer.on(ids.device), generator.condition(labels)
    x, view = generator.enter(ids.gather(1, order), embedded, tensors.feed, order, causal=True, mask=None)
    slots = torch.arange(1, longer.num_slots)
    read = Read((slots,), (slots,), (torch.ones(len(slots)),), True)
    return x, view, generator.read(generator.run_blocks(x, view), read, len(slots), view.modulator)


def run_forward(case: Case) -> list[Check]:
    """Logits, inputs of the first block and conditioning in raster and given orders; losses and gradients."""
    generator, plan = _network(case)
    ids, labels, orders = case.inputs["ids"], case.inputs["classes"], case.inputs["orders"]
    raster, null = plan.order.expand_as(orders), torch.full_like(labels, generator.condition.num_classes)
    partial = case.inputs["partial_ids"]
    known = partial.shape[1]
    filled = torch.zeros_like(ids).scatter(1, orders[:, :known], partial)

    first = generator.vocab_size + 1
    integers = {
        "condition": first + labels,
        "none_condition": first + null,
        "labels_raster": ids,
        "labels_orders": ids.gather(1, orders),
    }
    x_raster, _, logits_raster = _entered(generator, plan, ids, labels, raster)
    x, view, logits = _entered(generator, plan, ids, labels, orders)
    with torch.no_grad():
        x_partial, _, logits_partial = _entered(generator, plan, filled, labels, orders)
        logits_null = _entered(generator, plan, ids, null, orders)[2]
    assert view.modulator is not None
    got = {
        "x0_raster": x_raster,
        "x0_orders": x,
        "x0_partial": x_partial[:, : 2 + known],
        "cond_tokens_orders": view.modulator.vectors,
        "logits_raster": logits_raster,
        "logits_orders": logits,
        "logits_orders_none": logits_null,
        "logits_partial": logits_partial[:, : 1 + known],
    }
    trained = generator.logits(ids, labels, plan, order=orders)
    loss = token_cross_entropy(trained, ids)
    plain = generator.logits(ids, labels, plan)
    got |= {
        "loss_orders": loss.reshape(1),
        "accuracy_orders": token_accuracy(trained, ids).reshape(1),
        "loss_raster": token_cross_entropy(plain, ids).reshape(1),
        "accuracy_raster": token_accuracy(plain, ids).reshape(1),
    }
    checks = compare_all(case, integers, EXACT) + [
        compare(name, value, case.outputs[name], _relative(case.outputs[name]))
        for name, value in got.items()
        if name in case.outputs
    ]
    checks += compare_gradients(case, generator, loss, to_published)
    return checks + _table_gradients(case, generator)


def _relative(want: Tensor) -> Tolerance:
    """Rounding grows with the largest value of a tensor, as the cases state."""
    return Tolerance(1e-5 * max(1.0, want.abs().max().item()), 1e-4)


def _table_gradients(case: Case, generator: Transformer) -> list[Check]:
    """Gradients of the first rows of the three position tables."""
    gradients = to_published({name: p.grad for name, p in generator.named_parameters() if p.grad is not None})
    names = {
        "grad_pos_embed_head": "pos_embed",
        "grad_target_aware_head": "target_aware_pos_embed",
        "grad_timesteps_head": "timesteps_embeddings",
    }
    return [
        compare(name, gradients[table][:, : case.outputs[name].shape[1]], case.outputs[name], Tolerance(1e-6, 1e-3))
        for name, table in names.items()
        if name in case.outputs
    ]


def run_generate(case: Case) -> list[Check]:
    """Greedy decoding under every guidance of the case, logits of both branches."""
    generator, plan = _network(case)
    labels, checks = case.inputs["classes"], []
    for variant in case.data["runs"]:
        scale, name = variant["guidance_scale"], variant["name"]
        guidance = Guidance()
        if scale:
            guidance = Guidance(scale=scale, schedule="power-cosine", power=variant["guidance_scale_pow"])
        found = greedy(generator, plan, labels, guidance)
        conditional, unconditional = branches(generator, plan, found.tokens, labels)
        both = torch.cat([conditional, unconditional]) if scale else conditional
        checks.append(case.compare(f"{name}.ids", found.tokens, EXACT))
        want = case.outputs[f"{name}.step_logits"]
        checks.append(compare(f"{name}.step_logits", both, want, _relative(want)))
    return checks


def run_schedules(case: Case) -> list[Check]:
    """Share of random orders, learning rate, guidance per step, weight decay."""
    data, checks = case.data, []
    if "permutation_probability" in data:
        stated = data["permutation_probability"]
        shares = rar(grid=(16, 16), anneal_start=stated["anneal_start"], anneal_end=stated["anneal_end"]).random_order
        assert shares is not None
        got = torch.tensor([shares.share(step) for step, _ in stated["values"]], dtype=torch.float64)
        checks.append(compare("permutation probability", got, _second(stated["values"]), SCHEDULES))
    if "learning_rate" in data:
        stated = data["learning_rate"]
        schedule = LrSchedule(
            shape="cosine",
            warmup=stated["warmup"],
            total=stated["total"],
            end=stated["end"] / stated["base"],
            from_zero=True,
        )
        factors = [schedule.factor(step) for step, _ in stated["values"]]
        got = stated["base"] * torch.tensor(factors, dtype=torch.float64)
        checks.append(compare("learning rate", got, _second(stated["values"]), Tolerance(1e-12, 1e-6)))
    for name, stated in data.get("guidance", {}).items():
        guidance = Guidance(scale=stated["scale"], schedule="power-cosine", power=stated["pow"])
        weights = [guidance.weight(step, stated["seq_len"]) for step in range(stated["seq_len"])]
        want = torch.tensor(stated["values"], dtype=torch.float64)
        checks.append(compare(f"guidance {name}", torch.tensor(weights, dtype=torch.float64), want, SCHEDULES))
    for name, stated in data.get("optimizer_groups", {}).items():
        checks += _decay(name, stated)
    return checks


def _second(pairs: list[list[float]]) -> Tensor:
    return torch.tensor([value for _, value in pairs], dtype=torch.float64)


def _decay(preset: str, stated: dict[str, Any]) -> list[Check]:
    """The recipe's decay groups on the preset, on the meta device."""
    sizes = yaml.safe_load((CONFIGS / "generator" / f"{preset}.yaml").read_text())
    recipe = yaml.safe_load((CONFIGS / "experiment" / f"{preset}.yaml").read_text())
    config = {
        "hidden_size": sizes["dim"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["heads"],
        "intermediate_size": sizes["ffn_hidden"],
        "codebook_size": 1024,
        "condition_num_classes": 1000,
    }
    with torch.device("meta"):
        named = list(build(config, (16, 16)).named_parameters())
    matrices = {name for name, parameter in named if parameter.ndim >= 2}
    decayed = decay_groups(named, 0.03, without_decay(matrices, recipe["task"]["optimizer"]["no_decay"]))[0]["params"]
    return [
        same(f"{preset} decayed tensors", len(decayed), stated["decay_tensors"]),
        same(f"{preset} decayed parameters", sum(p.numel() for p in decayed), stated["decay_params"]),
    ]


RUNNERS: list[tuple[Callable[[Case], bool], Callable[[Case], list[Check]]]] = [
    (lambda c: c.is_manifest and "timesteps_embeddings" in c.data, run_manifest),
    (lambda c: not c.state and "permutation_probability" in c.data, run_schedules),
    (lambda c: bool(c.state) and "orders" in c.inputs, run_forward),
    (lambda c: bool(c.state) and "runs" in c.data, run_generate),
]
