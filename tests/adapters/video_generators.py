"""What the adapters of LARP's and NAR's video generators share: networks, labels and presets."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import yaml
from adapters import Case, Check, UnknownCase, compare_manifest, count_parameters
from adapters.orders import CONFIGS, same
from omegaconf import OmegaConf
from torch import Tensor

from vgen.checkpoints.convert import StateDict, load_strict
from vgen.checkpoints.larp_ar import generator_arguments
from vgen.checkpoints.release import build
from vgen.generators.transformer import Transformer
from vgen.schedules.plan import Plan

Rename = Callable[[StateDict], StateDict]


def network(case: Case, plan: Plan, to_ours: Rename, *, last_position: bool) -> Transformer:
    """The network of a case with its weights, in eval mode."""
    generator = build(generator_arguments(case.config, plan, last_position=last_position))
    load_strict(generator, to_ours(case.state), what=case.name)
    return generator.eval()


def condition_of(case: Case) -> Tensor:
    """Labels, -1 being the null class; or the condition tokens without the separator, which our condition appends."""
    condition = case.inputs["cond"]
    if condition.dim() == 1:
        return torch.where(condition < 0, case.config["num_classes"], condition)
    if bool((condition[:, -1] != case.config["vocab_size"]).any()):
        raise UnknownCase("a condition that does not end with the separator")
    return condition[:, :-1]


def check_video_preset(
    case: Case, config: Mapping[str, Any], plan: Plan, family: str, to_ours: Rename, to_published: Rename
) -> list[Check]:
    """Our preset of the stated size, on the meta device, has exactly the published names, shapes and parameters."""
    folder = CONFIGS / "generator"
    shape = (config["dim"], config["n_layer"], config["n_head"])
    for path in sorted(folder.glob(f"{family}_*.yaml")):
        preset = yaml.safe_load(path.read_text())
        if (preset["dim"], preset["depth"], preset["heads"]) == shape:
            break
    else:
        raise UnknownCase(f"no preset configs/generator/{family}_*.yaml has (dim, depth, heads) = {shape}")
    layers = [OmegaConf.load(folder / f"{name}.yaml") for name in ("base", "video", path.stem)]
    merged = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=False)
    assert isinstance(merged, dict)
    # The condition, vocabulary, grid and heads are what a run fills in.
    filled = generator_arguments(config, plan, last_position=merged["last_position"])
    merged |= {key: filled[key] for key in ("condition", "vocab_size", "grid", "num_readouts")}
    with torch.device("meta"):
        generator = build({key: value for key, value in merged.items() if key != "defaults"})
    ours = generator.state_dict()
    parameters = count_parameters(generator)
    checks = compare_manifest(case, to_published(ours), parameters)
    checks.append(same("parameters", parameters, case.data["__params__"]))
    back = to_ours(to_published(ours))
    fits = {name: value.shape for name, value in back.items()} == {name: value.shape for name, value in ours.items()}
    return [*checks, Check("round trip", 0.0, fits, "names do not survive the round trip")]
