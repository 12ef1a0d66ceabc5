"""Published NAR weights, of images (class- and text-conditional) and video, to and from our names (NAR section 8)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vgen.checkpoints.convert import StateDict, load_strict, read_weights, rename, unwrap
from vgen.checkpoints.larp import read_published
from vgen.checkpoints.larp_ar import (
    OUR_POSITIONS,
    POSITIONS,
    generator_arguments,
    positions_to_ours,
    positions_to_published,
)
from vgen.checkpoints.release import build
from vgen.errors import UserError
from vgen.generators.transformer import Transformer
from vgen.schedules.catalog import load_plan
from vgen.schedules.plan import Plan

# Head 0 predicts the right neighbour; head 1, behind one more block, the one below.
_TO_OURS = {
    "cls_embedding.cap_proj.": "condition.",
    "cls_embedding.": "condition.",
    "norm.": "norms.0.",
    "output.": "outputs.0.",
    "medusa_norm.": "norms.1.",
    "medusa_output.": "outputs.1.",
}
_TO_PUBLISHED = {
    "condition.fc": "cls_embedding.cap_proj.fc",
    "condition.": "cls_embedding.",
    "norms.0.": "norm.",
    "outputs.0.": "output.",
    "norms.1.": "medusa_norm.",
    "outputs.1.": "medusa_output.",
}
# Of video: head 0 predicts the right neighbour (w + 1), head 1 the one below (h + 1), head 2 the one behind (t + 1).
_VIDEO_HEADS = "RDB"
_VIDEO_TO_OURS = {
    "cls_embedding.": "condition.",
    **{f"{part}_{name}.": f"{part}s.{head}." for head, name in enumerate(_VIDEO_HEADS) for part in ("norm", "output")},
}
_VIDEO_TO_PUBLISHED = {ours: published for published, ours in _VIDEO_TO_OURS.items()}


def to_ours(state: StateDict) -> StateDict:
    """Rename published keys; caches that were saved with a model after sampling are dropped."""
    if POSITIONS in state:
        return rename(positions_to_ours(state), _VIDEO_TO_OURS)
    kept = {name: value for name, value in state.items() if ".kv_cache." not in name and name != "freqs_cis"}
    return rename(kept, _TO_OURS)


def to_published(state: StateDict) -> StateDict:
    """Rename our keys to the published ones."""
    if OUR_POSITIONS in state:
        return rename(positions_to_published(state), _VIDEO_TO_PUBLISHED)
    return rename(state, _TO_PUBLISHED)


def load_nar(generator: Transformer, path: str | Path) -> None:
    """Load a published file such as ``last_version.pt`` of NAR-imagenet-256-B.

    Args:
        generator: built from the matching preset for the ``neighboring`` schedule on (H, W).
        path: the published file; the state dict may be nested under model, module or state_dict, or flat.

    Raises:
        UserError: for an unreadable file or any difference in names or shapes.
    """
    state = unwrap(read_weights(path), keys=("model", "module", "state_dict"), path=path)
    load_strict(generator, to_ours(state), what=str(path))


def video_plan_of(config: Mapping[str, Any]) -> Plan:
    """The plan of a video generator: three heads over its nominal grid (T, H, W)."""
    return load_plan("neighboring", tuple(config["latent_shape"]), {"num_condition": config.get("cls_token_num", 1)})


def load_nar_video(path: str | Path) -> tuple[Transformer, dict[str, Any], Plan]:
    """Build and load a published video generator, such as ``NAR-ucf101-256-L``.

    Args:
        path: a trainer's checkpoint with its constructor arguments, or a folder with one weight file and a ``.json``.

    Returns:
        The generator in eval mode, its configuration, and the plan it was trained for.

    Raises:
        UserError: for missing or unreadable files, unsupported options, and any difference in names or shapes.
    """
    file, config, content = read_published(path)
    if config.get("frame_prediction"):
        raise UserError(f"{path}: NAR's frame prediction does not work in the original and was never published")
    try:
        plan = video_plan_of(config)
        network = generator_arguments(config, plan, last_position=True)
    except KeyError as error:
        raise UserError(f"{path} does not describe a NAR video generator ({error} is missing)") from error
    generator = build(network)
    assert isinstance(generator, Transformer)
    load_strict(generator, to_ours(unwrap(content, keys=("sd",), path=file)), what=str(file))
    return generator.eval(), network, plan
