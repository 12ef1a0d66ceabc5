"""Published TiTok, TA-TiTok and MaskGIT-VQGAN weights to and from our names (TiTok section 8).

Our module names are the published ones; the map only adds and drops statistics of the codebook. As a command it turns a
published file into a release folder: ``python -m vgen.checkpoints.titok --help``.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

import vgen
from vgen.checkpoints.convert import StateDict, load_strict, read_weights, unwrap
from vgen.checkpoints.release import build, save_release
from vgen.errors import UserError, reported
from vgen.losses.blur_discriminator import BlurDiscriminator
from vgen.tokenizers.maskgit_vqgan import MaskGITVQGAN
from vgen.tokenizers.proxy import ProxyTokenizer
from vgen.tokenizers.titok import TiTok
from vgen.tokenizers.titok_vit import SIZES

CONFIGS = Path(vgen.__file__).parents[1] / "configs" / "tokenizer"
_USAGE, _SHARES = "quantize.codebook_used", "quantize.embed_prob"
_SIZE_KEYS = ("width", "layers", "heads")


def to_ours(state: StateDict, tokenizer: TiTok | MaskGITVQGAN) -> StateDict:
    """Add the statistics that published files lack, and drop those that this tokenizer does not keep."""
    own = tokenizer.state_dict()
    weights = {name: value for name, value in state.items() if name in own or name not in (_USAGE, _SHARES)}
    added = {name: torch.zeros_like(own[name]) for name in (_USAGE, _SHARES) if name in own and name not in state}
    return weights | added


def to_published(state: StateDict) -> StateDict:
    """Names as published; the shares of a clustering codebook are part of the original's training files."""
    return {name: value for name, value in state.items() if name != _USAGE}


def load_titok(tokenizer: TiTok, path: str | Path) -> None:
    """Load a published file such as ``tokenizer_titok_l32.bin`` or a hub repository's ``model.safetensors``.

    Args:
        tokenizer: built from the matching preset.
        path: flat state dict.

    Raises:
        UserError: for an unreadable file or any difference in names or shapes.
    """
    state = unwrap(read_weights(path), keys=(), path=path)
    load_strict(tokenizer, to_ours(state, tokenizer), what=str(path))


def load_maskgit_vqgan(tokenizer: MaskGITVQGAN, path: str | Path) -> None:
    """Load ``maskgit-vqgan-imagenet-f16-256.bin``.

    Raises:
        UserError: for an unreadable file or any difference in names or shapes.
    """
    state = unwrap(read_weights(path), keys=(), path=path)
    load_strict(tokenizer, to_ours(state, tokenizer), what=str(path))


def load_titok_discriminator(discriminator: BlurDiscriminator, state: StateDict) -> None:
    """Load the discriminator out of the state dict of the original's loss module.

    Raises:
        UserError: for any difference in names or shapes.
    """
    inside = {k.removeprefix("discriminator."): v for k, v in state.items() if k.startswith("discriminator.")}
    load_strict(discriminator, inside or state, what="discriminator")


def options_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of :class:`TiTok` for a published ``config.json``.

    Args:
        config: with ``model.vq_model`` and ``dataset.preprocessing.crop_size``; ``is_legacy`` and ``finetune_decoder``
            count as true where they are missing, as in the original.

    Raises:
        UserError: if a key is missing or a size is unknown.
    """
    try:
        model = dict(config["model"]["vq_model"])
        image_size = config["dataset"]["preprocessing"]["crop_size"]
        sizes = [dict(zip(_SIZE_KEYS, SIZES[model[f"vit_{part}_model_size"]], strict=True)) for part in ("enc", "dec")]
        gaussian = model.get("quantize_mode", "vq") == "vae"
        legacy, finetuned = model.get("is_legacy", True), model.get("finetune_decoder", True)
        options: dict[str, Any] = {
            "image_size": image_size,
            "patch_size": model["vit_enc_patch_size"],
            "decoder_patch_size": model["vit_dec_patch_size"],
            "num_latent_tokens": model["num_latent_tokens"],
            "token_size": model["token_size"],
            "encoder": sizes[0],
            "decoder": sizes[1],
            "codebook_size": 0 if gaussian else model["codebook_size"],
            "l2_normalize": model.get("use_l2_norm", False),
            "commitment_weight": model.get("commitment_cost", 0.25),
            "bottleneck": "gaussian" if gaussian else "clustering_vq" if model.get("clustering_vq") else "vq",
            "latent_layout": "legacy" if legacy else "per_token",
            "head": "proxy" if legacy else "pixel",
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"the TiTok configuration lacks or has an unknown {error}; give a --preset instead") from error
    if legacy:
        options["proxy_codebook_size"] = 1024
        if finetuned:
            options["pixel_decoder"] = _preset("titok_l32")["pixel_decoder"]
    if "text_context_length" in model:
        options |= {"text_length": model["text_context_length"], "text_dim": model["text_embed_dim"]}
    return {"_target_": "vgen.tokenizers.titok.TiTok", **options}


def check_layout(state: StateDict, options: Mapping[str, Any], path: str | Path) -> None:
    """Compare what a state dict shows of its layout with the options it is to be loaded into.

    Raises:
        UserError: naming the option to change.
    """
    shown = {
        "head": "proxy" if "decoder.ffn.2.weight" in state else "pixel",
        "bottleneck": "vq" if "quantize.embedding.weight" in state else "gaussian",
    }
    # One switch of the original chooses the head and this layout, which does not show in the keys.
    shown["latent_layout"] = "legacy" if shown["head"] == "proxy" else "per_token"
    stated = {key: options.get(key) for key in shown}
    if stated["bottleneck"] == "clustering_vq":
        stated["bottleneck"] = "vq"
    wrong = [f"{key}={stated[key]} instead of {value}" for key, value in shown.items() if stated[key] != value]
    if wrong:
        raise UserError(f"{path} is another kind of TiTok: {', '.join(wrong)}; choose another --preset")


def add_pixel_decoder(tokenizer: TiTok, teacher: ProxyTokenizer) -> None:
    """Copy the teacher's decoder and codebook into a two-stage TiTok, as the second stage begins.

    Raises:
        UserError: if the teacher is another than the one the tokenizer was configured for.
    """
    if tokenizer.pixel_decoder is None or tokenizer.pixel_quantize is None:
        raise UserError("this TiTok has no pixel decoder; it needs head=proxy and pixel_decoder")
    load_strict(tokenizer.pixel_quantize, {"embedding.weight": teacher.codebook.detach()}, what="the proxy codebook")
    load_strict(tokenizer.pixel_decoder, teacher.pixel_decoder_state(), what="the proxy tokenizer's decoder")


def import_titok(
    file: Path, out: Path, *, preset: str | None = None, config: Path | None = None, proxy: Path | None = None
) -> Path:
    """Write the release of a published TiTok, TA-TiTok or MaskGIT-VQGAN.

    Args:
        file: published weights.
        out: release folder.
        preset: name of a file in configs/tokenizer.
        config: ``config.json`` of the hub repository, instead of a preset.
        proxy: MaskGIT-VQGAN file whose decoder completes a first-stage file.

    Raises:
        UserError: if the file does not fit.
    """
    if (preset is None) == (config is None):
        raise UserError("give either --preset or --config")
    options = _preset(preset) if preset is not None else options_from_config(_read_json(config))
    tokenizer = build(options)
    if isinstance(tokenizer, MaskGITVQGAN):
        load_maskgit_vqgan(tokenizer, file)
    elif isinstance(tokenizer, TiTok):
        state = unwrap(read_weights(file), keys=(), path=file)
        check_layout(state, options, file)
        if proxy is not None:
            teacher = build(_preset("maskgit_vqgan"))
            load_maskgit_vqgan(teacher, proxy)
            add_pixel_decoder(tokenizer, teacher)
            pixels = {k: v for k, v in tokenizer.state_dict().items() if k.startswith(("pixel_decoder.", "pixel_q"))}
            state = pixels | state
        load_strict(tokenizer, to_ours(state, tokenizer), what=str(file))
    else:
        raise UserError(f"--preset {preset} is no TiTok and no MaskGIT-VQGAN")
    return save_release(out, tokenizer, options, kind="tokenizer", extra={"source": file.name})


def _preset(name: str) -> dict[str, Any]:
    path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        names = sorted(p.stem for pattern in ("*titok_*", "maskgit*") for p in CONFIGS.glob(f"{pattern}.yaml"))
        raise UserError(f"--preset {name} is no preset; choose one of {', '.join(names)}")
    return yaml.safe_load(path.read_text())


def _read_json(path: Path | None) -> dict[str, Any]:
    assert path is not None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vgen.checkpoints.titok",
        description="Turn published TiTok, TA-TiTok or MaskGIT-VQGAN weights into a release folder.",
        epilog="example: python -m vgen.checkpoints.titok tokenizer_titok_l32.bin --preset titok_l32 "
        "--out releases/titok_l32",
    )
    parser.add_argument("file", type=Path, help="flat state dict: .bin or .safetensors")
    parser.add_argument("--preset", help="configs/tokenizer/<preset>.yaml, such as titok_l32 or maskgit_vqgan")
    parser.add_argument("--config", type=Path, help="config.json of the hub repository, instead of --preset")
    parser.add_argument("--proxy", type=Path, help="MaskGIT-VQGAN file that completes a first-stage TiTok")
    parser.add_argument("--out", type=Path, required=True, help="release folder to write")
    chosen = parser.parse_args(arguments)
    with reported():
        release = import_titok(chosen.file, chosen.out, preset=chosen.preset, config=chosen.config, proxy=chosen.proxy)
        print(f"release: {release}")


if __name__ == "__main__":
    main()
