"""Published FlexTok files and their VAEs to and from our names (FlexTok section 2)."""

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from vgen.checkpoints.convert import StateDict, load_strict, read_weights, rename, unwrap
from vgen.errors import UserError
from vgen.tokenizers.autoencoder_kl import AutoencoderKL
from vgen.tokenizers.flextok import FlexTok

_TO_OURS = {
    "vae.vae.": "vae.",
    "encoder.module_dict.enc_patch_emb.patch_proj.": "encoder.patch_embed.",
    "encoder.module_dict.enc_posemb_module.posembs": "encoder.positions.table",
    "encoder.module_dict.enc_register_module.registers": "encoder.registers",
    "encoder.module_dict.enc_transformer.": "encoder.",
    "encoder.module_dict.enc_to_latents.proj.": "encoder.head.",
    "decoder.module_dict.dec_from_latents.proj.": "decoder.from_codes.",
    "decoder.module_dict.dec_registers_posemb_module.posembs": "decoder.register_positions",
    "decoder.module_dict.dec_nested_dropout.dropout_mask_token": "decoder.mask_token",
    "decoder.module_dict.dec_latent_dropout.nullcond": "decoder.null_token",
    "decoder.module_dict.dec_noise_patch_emb.patch_proj.": "decoder.patch_embed.",
    "decoder.module_dict.dec_patches_posemb_module.posembs": "decoder.positions.table",
    "decoder.module_dict.dec_time_embedder.": "decoder.time.",
    "decoder.module_dict.dec_transformer.": "decoder.",
    "decoder.module_dict.dec_to_patches.adaLN_modulation.": "decoder.head_modulation.",
    "decoder.module_dict.dec_to_patches.proj.": "decoder.head.",
}
_TO_PUBLISHED = {ours: published for published, ours in _TO_OURS.items() if not published.endswith("transformer.")} | {
    "encoder.blocks.": "encoder.module_dict.enc_transformer.blocks.",
    "decoder.blocks.": "decoder.module_dict.dec_transformer.blocks.",
}
_INSIDE_BLOCKS = {
    ".mlp.fc1.": ".mlp.w1.",
    ".mlp.fc2.": ".mlp.w2.",
    ".mlp.fc3.": ".mlp.w3.",
    ".adaLN_modulation.": ".modulation.",
}
_IGNORED = "decoder.module_dict.dec_repa"
# Names of the attention layers in diffusers before 0.18.
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_HEADER = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")


def to_ours(state: StateDict, tokenizer: FlexTok | None = None) -> StateDict:
    """Rename published keys.

    Args:
        state: under the published names; projectors of the REPA loss are left out with a warning.
        tokenizer: supplies the fixed position tables where the file lacks them.
    """
    projectors = sorted(name for name in state if name.startswith(_IGNORED))
    if projectors:
        warnings.warn(
            f"{len(projectors)} weights of the REPA projector are not used: {projectors[0]} ...", stacklevel=2
        )
    renamed = rename({name: value for name, value in state.items() if name not in projectors}, _TO_OURS)
    ours = {_swap(name, _INSIDE_BLOCKS) if ".blocks." in name else name: value for name, value in renamed.items()}
    if tokenizer is not None:
        own = tokenizer.state_dict()
        tables = ("encoder.positions.table", "decoder.positions.table")
        ours |= {name: own[name] for name in tables if name in own and name not in ours}
    return ours


def to_published(state: StateDict) -> StateDict:
    """Rename our keys to the published ones."""
    inside = {ours: published for published, ours in _INSIDE_BLOCKS.items()}
    named = {_swap(name, inside) if ".blocks." in name else name: value for name, value in state.items()}
    return rename({name: value for name, value in named.items()}, {"vae.": "vae.vae."} | _TO_PUBLISHED)


def load_flextok(tokenizer: FlexTok, path: str | Path) -> None:
    """Load a published ``model.safetensors`` of EPFL-VILAB/flextok_*.

    Args:
        tokenizer: built from the matching preset, or from :func:`flextok_config`.
        path: the published file.

    Raises:
        UserError: for an unreadable file or any difference in names or shapes, REPA projectors excepted.
    """
    load_strict(tokenizer, to_ours(unwrap(read_weights(path), keys=(), path=path), tokenizer), what=str(path))


def flextok_config(path: str | Path) -> dict[str, Any]:
    """Constructor arguments of the tokenizer in a published file: sizes from its tensors, the rest from its header.

    The header holds the original's construction recipe. It is read as plain data; nothing of it is run.

    Raises:
        UserError: if the file is not one of FlexTok, or its recipe asks for what is not supported here.
    """
    path = Path(path)
    shapes, header = _inspect(path)
    recipe = {name: _parse(header[name], name, path) for name in _HEADER if name in header}
    if not recipe:
        recipe = _read_json(path.with_name("config.json"))

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise UserError(f"{path} is no FlexTok file: it lacks {name}")
        return shapes[name]

    names = {ours: published for published, ours in _TO_OURS.items()}
    registers, width = shape(names["encoder.registers"])
    embedded = shape(names["decoder.patch_embed."] + "weight")
    channels = shape("vae.vae.post_quant_conv.weight")[0]
    patch = round((embedded[1] / channels) ** 0.5)
    grid = shapes.get(names["decoder.positions.table"], (1, embedded[0], 16, 16))[2:]
    levels = _find(recipe, "levels", [8, 8, 8, 5, 5, 5])
    if len(levels) != shape(names["decoder.from_codes."] + "weight")[1]:
        raise UserError(f"{path}: {len(levels)} FSQ levels {levels} do not fit the decoder; the header is damaged")
    vae_shapes = {name.removeprefix("vae.vae."): value for name, value in shapes.items() if name.startswith("vae.vae.")}
    vae = vae_config(vae_shapes, recipe.get("vae", {}), image_size=0)
    vae["image_size"] = grid[0] * patch * 2 ** (len(vae["block_channels"]) - 1)
    time = names["decoder.time."] + "mlp.0.weight"
    return {
        "_target_": "vgen.tokenizers.flextok.FlexTok",
        "vae": vae,
        "num_tokens": registers,
        "levels": list(levels),
        "patch": patch,
        "encoder": {
            "dim": width,
            "depth": _depth(shapes, "encoder.module_dict.enc_transformer.blocks."),
            "head_dim": _find(recipe.get("encoder", {}), "head_dim", 64),
            "visibility": _find(recipe.get("encoder", {}), "mask_mode", "causal_last"),
        },
        "decoder": {
            "dim": embedded[0],
            "depth": _depth(shapes, "decoder.module_dict.dec_transformer.blocks."),
            "head_dim": _find(recipe.get("decoder", {}), "head_dim", 64),
            "time_features": shape(time)[1],
            "max_time": float(_find(recipe.get("decoder", {}), "max_timestep", 1.0)),
        },
    }


def vae_config(shapes: Mapping[str, tuple[int, ...]], recipe: Mapping[str, Any], *, image_size: int) -> dict[str, Any]:
    """Constructor arguments of an :class:`AutoencoderKL`.

    Args:
        shapes: of its tensors under the diffusers names.
        recipe: its ``config.json`` (diffusers), for what tensors do not tell: scaling_factor and norm_num_groups.
        image_size: side in pixels.
    """
    levels, blocks = _depth(shapes, "encoder.down_blocks."), _depth(shapes, "encoder.down_blocks.0.resnets.")
    if "encoder.conv_out.weight" not in shapes or not blocks:
        raise UserError("the weights are not those of a diffusers AutoencoderKL: encoder.down_blocks are missing")
    scale = _find(recipe, "scaling_factor", None)
    if scale is None:
        scale = 0.18215
        warnings.warn(
            "the file does not state the VAE's scaling_factor; 0.18215, the default of diffusers, is used", stacklevel=2
        )
    return {
        "_target_": "vgen.tokenizers.autoencoder_kl.AutoencoderKL",
        "image_size": image_size,
        "latent_channels": shapes["encoder.conv_out.weight"][0] // 2,
        "block_channels": [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": blocks,
        "norm_groups": int(_find(recipe, "norm_num_groups", 32)),
        "scaling_factor": float(scale),
    }


def load_published_vae(vae: AutoencoderKL, path: str | Path) -> None:
    """Load ``diffusion_pytorch_model.safetensors`` of a diffusers AutoencoderKL, such as EPFL-VILAB/flextok_vae_c16.

    Raises:
        UserError: for an unreadable file or any difference in names or shapes.
    """
    load_strict(vae, vae_to_ours(unwrap(read_weights(path), keys=("state_dict",), path=path)), what=str(path))


def vae_to_ours(state: StateDict) -> StateDict:
    """Strip the wrapper's prefix and modernise old attention names; otherwise our names are those of diffusers."""
    ours = {}
    for name, value in state.items():
        name = name.removeprefix("vae.")
        if ".attentions." in name:
            name = _swap(name, _OLD_ATTENTION)
            value = value.flatten(1) if value.dim() == 4 else value
        ours[name] = value
    return ours


def published_vae_config(path: str | Path, *, image_size: int) -> dict[str, Any]:
    """Constructor arguments of the VAE in a diffusers weight file, with its ``config.json`` beside it."""
    path = Path(path)
    shapes = {name: tuple(value.shape) for name, value in vae_to_ours(read_weights(path)).items()}
    return vae_config(shapes, _read_json(path.with_name("config.json")), image_size=image_size)


def _swap(name: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def _depth(shapes: Mapping[str, Any], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def _inspect(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of the tensors of a safetensors file and its header, without reading the tensors."""
    if not path.is_file():
        raise UserError(f"there is no weight file {path}")
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return shapes, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); it is truncated or no safetensors file: copy it again"
        ) from error


def _parse(text: str, name: str, path: Path) -> Any:
    """A header entry as plain data: a Python literal, or YAML."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    try:
        return yaml.safe_load(re.sub(r"\bNone\b", "null", text))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: the entry {name} of the header is neither a Python literal nor YAML") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error


def _find(recipe: Any, key: str, default: Any) -> Any:
    """First value of a key anywhere in nested containers."""
    return next(_values(recipe, key), default)


def _values(node: Any, key: str) -> Iterator[Any]:
    if isinstance(node, Mapping):
        if node.get(key) is not None:
            yield node[key]
        for value in node.values():
            yield from _values(value, key)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _values(value, key)
