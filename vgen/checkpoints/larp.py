"""Published LARP tokenizers and discriminators (arXiv 2410.21264), and the fork of them that NAR uses.

Our module names are the published ones. What we add, the window of codebook usage and the running logits of LeCam,
starts empty.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vgen.checkpoints.convert import StateDict, load_strict, read_weights, unwrap
from vgen.checkpoints.release import save_release
from vgen.errors import UserError, reported
from vgen.tokenizers.larp import LARP

_OURS = ("bottleneck.regularizer.codebook_used", "running")
_PRIOR = "prior_model."
_PATCHES = "x_embedder.proj.weight"
_FIXED = {
    "transformer_name": "transformer_encoder_parallel",
    "encoder_name": "none",
    "decoder_name": "none",
    "in_channels": 3,
    "learned_encoder_patch_pe": False,
    "learned_encoder_latent_query_embed": True,
    "learned_decoder_patch_query_embed": False,
    "use_encoder_patch_token_type_embed": False,
    "use_encoder_latent_query_token_type_embed": False,
    "use_decoder_latent_token_type_embed": False,
    "use_decoder_patch_query_token_type_embed": True,
    "encoder_query_gaussian_init": True,
    "latent_pe_scale_factor": 10000,
}
"""Switches that all published tokenizers leave in this position; no others are supported."""
_PRIOR_SIZES = {"gptc-S": {"dim": 384, "depth": 12, "heads": 6}}


def tokenizer_arguments(
    config: Mapping[str, Any],
    *,
    prior_sizes: Mapping[str, int] | None = None,
    nominal_grid: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Arguments of :class:`vgen.tokenizers.larp.LARP` from published constructor arguments (``config.json``).

    Args:
        config: the published arguments, nested.
        prior_sizes: dim, depth and heads of a prior other than the published one.
        nominal_grid: see LARP.

    Raises:
        UserError: for a switch whose position is not supported.
    """
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"LARP option {key}={config[key]} is not supported (published tokenizers use {value})")
    patch = (config["temporal_patch_size"], config["patch_size"])
    if (config["decoder_temporal_patch_size"], config["decoder_patch_size"]) != patch:
        raise UserError("LARP with decoder patches unlike the encoder's does not work")
    bottleneck, regularizer = config["bottleneck"], config["bottleneck"]["args"]["regularizer"]
    if bottleneck["name"] != "bottleneck" or regularizer["name"] != "vq" or bottleneck["args"]["norm"] != "none":
        raise UserError("LARP bottlenecks other than a vector quantizer without norm are not supported")
    quantizer = regularizer["args"]
    if quantizer["codebook_loss_weight"] != 1.0:
        raise UserError("LARP codebook_loss_weight other than 1 is not supported; scale the other weights instead")
    stochastic = quantizer["stochastic"]
    return {
        "image_size": config["input_size"],
        "num_frames": config["frame_num"],
        "patch": [patch[0], patch[1], patch[1]],
        "num_tokens": config["bottleneck_token_num"],
        "nominal_grid": None if nominal_grid is None else list(nominal_grid),
        "encoder_dim": config["encoder_hidden_size"],
        "encoder_depth": config["encoder_depth"],
        "encoder_heads": config["encoder_num_heads"],
        "decoder_dim": config["decoder_hidden_size"],
        "decoder_depth": config["decoder_depth"],
        "decoder_heads": config["decoder_num_heads"],
        "codebook_size": quantizer["codebook_size"],
        "codebook_dim": bottleneck["args"]["bottleneck_dim"],
        "l2_normalize": quantizer["l2_normalized"],
        "stochastic_temperature": quantizer["stochastic_temperature"] if stochastic else 0.0,
        "quantizer_weight": 0.1,
        "commitment_weight": quantizer["commitment_loss_weight"],
        "entropy_weight": quantizer["entropy_loss_weight"],
        "entropy_temperature": quantizer["entropy_loss_temperature"],
        "prior": _prior_arguments(config.get("prior_model"), prior_sizes),
        "prior_weight": 0.06,
        "query_init_std": config["query_init_std"],
        "usage_window": 65536,
        "gradient_checkpointing": False,
    }


def _prior_arguments(prior: Mapping[str, Any] | None, sizes: Mapping[str, int] | None) -> dict[str, Any] | None:
    if prior is None or prior["name"] == "none":
        return None
    if sizes is None and prior["name"] not in _PRIOR_SIZES:
        raise UserError(f"LARP prior {prior['name']} is unknown; known are {', '.join(_PRIOR_SIZES)}")
    if not prior["args"].get("l2_normalized", True) or prior["no_grad_before_last_round"]:
        raise UserError("LARP priors without normalised codes, or without gradients in early rounds, are not supported")
    if not prior["avg_loss_over_rounds"] and prior["use_mix_ss"] and prior["n_rounds"] > 1:
        raise UserError("LARP priors that sum the loss over rounds are not supported")
    return {
        **(sizes or _PRIOR_SIZES[prior["name"]]),
        "dropout": 0.0 if prior["no_dropout"] else 0.1,
        "rounds": prior["n_rounds"] if prior["use_mix_ss"] else 1,
        "sampled_share": prior["mix_ss_max_ratio"],
        "sampled_rise": prior["mix_ss_peak_steps_ratio"],
        "temperature": prior["latent_ce_temperature"],
    }


def to_ours(state: StateDict, module: nn.Module) -> StateDict:
    """Add what only our modules hold, empty; patches of a single frame are published as a 2D convolution."""
    own = module.state_dict()
    patches = state.get(_PATCHES)
    if patches is not None and patches.dim() == 4:
        state = state | {_PATCHES: patches.unsqueeze(2)}
    return state | {name: torch.zeros_like(own[name]) for name in _OURS if name in own}


def to_published(state: StateDict) -> StateDict:
    """Leave out what only our modules hold, and undo the rest of :func:`to_ours`."""
    published = {name: value for name, value in state.items() if name not in _OURS}
    if _PATCHES in published and published[_PATCHES].shape[2] == 1:
        published[_PATCHES] = published[_PATCHES].squeeze(2)
    return published


def has_prior(state: StateDict) -> bool:
    """Whether a published tokenizer file holds the prior, which decoding does not need."""
    return any(name.startswith(_PRIOR) for name in state)


def load_larp_tokenizer(path: str | Path, *, nominal_grid: Sequence[int] | None = None) -> tuple[LARP, dict[str, Any]]:
    """Build and load a published tokenizer.

    Args:
        path: a folder with one weight file (``.safetensors`` or ``.pth``) and one ``.json`` with the constructor
            arguments, as on the hub and in NAR's fork, or a trainer's checkpoint that holds both.
        nominal_grid: see :class:`vgen.tokenizers.larp.LARP`; NAR's generators need (4, 16, 16).

    Returns:
        The tokenizer and its constructor arguments. Without a prior in the file the tokenizer has none.

    Raises:
        UserError: for missing or unreadable files, unsupported options, and any difference in names or shapes.
    """
    path = Path(path)
    file, config, content = read_published(path)
    state = unwrap(content, keys=("sd",), path=file)
    try:
        arguments = tokenizer_arguments(config, nominal_grid=nominal_grid)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe a LARP tokenizer ({error} is missing)") from error
    if not has_prior(state):
        arguments["prior"] = None
    tokenizer = LARP(**arguments)
    load_strict(tokenizer, to_ours(state, tokenizer), what=str(file))
    return tokenizer, {"_target_": "vgen.tokenizers.larp.LARP", **arguments}


def load_larp_discriminator(discriminator: nn.Module, path: str | Path) -> None:
    """Load the discriminator out of a trainer's checkpoint of the original, or a flat state dict.

    Raises:
        UserError: for an unreadable file or any difference in names or shapes.
    """
    content = read_weights(path)
    if isinstance(content, Mapping) and isinstance(content.get("loss"), Mapping):
        content = content["loss"]
    state = unwrap(content, keys=("sd",), path=path)
    # The original's loss object also holds LPIPS and the running logits.
    prefix = "discriminator."
    nested = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    load_strict(discriminator, to_ours(nested or state, discriminator), what=str(path))


def import_larp_tokenizer(path: str | Path, out: str | Path, *, nominal_grid: Sequence[int] | None = None) -> Path:
    """Write the release of a published tokenizer; arguments and errors as in :func:`load_larp_tokenizer`."""
    tokenizer, arguments = load_larp_tokenizer(path, nominal_grid=nominal_grid)
    return save_release(out, tokenizer, arguments, kind="tokenizer", extra={"source": Path(path).name})


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vgen.checkpoints.larp",
        description="Turn a published LARP tokenizer into a release folder for task.tokenizer and evaluate.py.",
        epilog="example: python -m vgen.checkpoints.larp LARP-L-long-tokenizer releases/larp --grid 4 16 16",
    )
    parser.add_argument("source", type=Path, help="folder with weights and .json, or a trainer's checkpoint")
    parser.add_argument("out", type=Path, help="release folder to write")
    parser.add_argument("--grid", type=int, nargs=3, help="nominal (t, h, w) grid, 4 16 16 for NAR's generators")
    chosen = parser.parse_args(arguments)
    with reported():
        print(f"release: {import_larp_tokenizer(chosen.source, chosen.out, nominal_grid=chosen.grid)}")


def read_published(path: str | Path) -> tuple[Path, Mapping[str, Any], Any]:
    """Weight file, constructor arguments and content of a published network.

    Args:
        path: a folder with one weight file and one ``.json``, or a trainer's checkpoint.

    Raises:
        UserError: for missing or unreadable files.
    """
    path = Path(path)
    if path.is_dir():
        weights = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pth", ".pt", ".bin"))
        configs = sorted(path.glob("*.json"))
        if len(weights) != 1 or len(configs) != 1:
            raise UserError(f"{path} must hold one weight file and one .json with the constructor arguments")
        try:
            return weights[0], json.loads(configs[0].read_text()), read_weights(weights[0])
        except ValueError as error:
            raise UserError(f"{configs[0]} is not JSON ({error}); copy it again") from error
    content = read_weights(path)
    model = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(model.get("args"), Mapping):
        raise UserError(f"{path} does not hold its constructor arguments; give the folder with its config.json")
    return path, model["args"], model


if __name__ == "__main__":
    main()
