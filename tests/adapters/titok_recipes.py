"""recipes.json of TiTok: EMA decay, learning rates and weight-decay groups."""

from collections.abc import Iterable
from typing import Any

import torch
import yaml
from adapters import Case, Check
from torch import nn

from vgen.checkpoints.release import build
from vgen.checkpoints.titok import CONFIGS
from vgen.losses.blur_discriminator import BlurDiscriminator
from vgen.training.ema import EMA
from vgen.training.optim import LrSchedule, decay_groups, freeze_others, without_decay

TASKS = CONFIGS.parent / "task"
STAGES = {"stage1": "titok_stage1", "stage2": "titok_stage2"}
# Networks of another system, whose adapter checks them.
ELSEWHERE = {"generator_vit", "generator_uvit"}


def run_recipes(case: Case) -> list[Check]:
    checks = [*_ema(case.data["ema"])]
    for stage in STAGES:
        checks += _lr(stage, case.data[f"lr_{stage}"])
    for name, want in case.data["optimizer_groups"].items():
        if name not in ELSEWHERE:
            checks += _groups(name, want, case.data["trainable_params"].get(name))
    return checks


def _ema(case: dict[str, Any]) -> Iterable[Check]:
    ema = EMA({"w": nn.Parameter(torch.zeros(1))}, decay=case["max_decay"], warmup=True)
    for update, want in case["values"]:
        error = abs(ema.decay_at(update - 1) - want)
        yield Check(f"ema decay of update {update}", error, error < 1e-12)


def _lr(stage: str, case: dict[str, Any]) -> Iterable[Check]:
    """The shipped task file, with only the case's number of steps and warm-up put in."""
    stated = _task(STAGES[stage])["lr_schedule"]
    options = {key: value for key, value in stated.items() if key != "_target_"}
    same = options["warmup"] == case["warmup"] and abs(options["end"] * case["base"] - case["end"]) < 1e-12
    yield Check(f"{stage} schedule", float(not same), same, "the task file states another warm-up or end")
    schedule = LrSchedule(**options | {"total": case["total"]})
    for step, want in case["values"]:
        error = abs(case["base"] * schedule.factor(step) - want)
        yield Check(f"{stage} lr of step {step}", error, error < 1e-15)


def _groups(name: str, want: dict[str, Any], trainable: int | None) -> Iterable[Check]:
    network = _network(name)
    if name.endswith("stage2"):
        freeze_others(network, _task("titok_stage2")["train_only"])
    optimizer = _task("titok_stage1")["optimizer"]
    same = all(_task(task)["optimizer"]["no_decay"] == optimizer["no_decay"] for task in STAGES.values())
    yield Check(f"{name} rule", float(not same), same, "the task files name other parameters")
    matrices = {key for key, p in network.named_parameters() if p.ndim >= 2}
    groups = decay_groups(network.named_parameters(), 1.0, without_decay(matrices, optimizer["no_decay"]))
    for label, decay in (("decay", 1.0), ("no_decay", 0.0)):
        parameters = [p for group in groups if group["weight_decay"] == decay for p in group["params"]]
        for kind, got in (("tensors", len(parameters)), ("params", sum(p.numel() for p in parameters))):
            error = abs(got - want[f"{label}_{kind}"])
            yield Check(f"{name} {label}_{kind}", float(error), error == 0)
    still = {id(p) for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    names = sorted(key for key, p in network.named_parameters() if id(p) in still and p.ndim >= 2)
    same = names == sorted(want["no_decay_matrices"])
    yield Check(f"{name} matrices without decay", float(not same), same, f"{names}")
    if trainable is not None:
        got = sum(p.numel() for p in network.parameters() if p.requires_grad)
        yield Check(f"{name} trainable", float(abs(got - trainable)), got == trainable)


def _network(name: str) -> nn.Module:
    with torch.device("meta"):
        if name == "discriminator":
            return BlurDiscriminator()
        preset, _, stage = name.partition("_stage")
        options = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text())
        return build(options | ({"pixel_decoder": None} if stage == "1" else {}))


def _task(name: str) -> dict[str, Any]:
    """A task file over the one it inherits from."""
    own = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
    merged: dict[str, Any] = {}
    for parent in own.pop("defaults", []):
        merged |= {} if parent == "_self_" else _task(parent)
    for key, value in own.items():
        merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    return merged
