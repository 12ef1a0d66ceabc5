"""Turn published weights into release folders: ``python -m vgen.checkpoints --help``."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_class

import vgen
from vgen.checkpoints.flextok import flextok_config, load_flextok, load_published_vae, published_vae_config
from vgen.checkpoints.llamagen_gpt import load_llamagen_gpt
from vgen.checkpoints.llamagen_vq import load_llamagen_vq
from vgen.checkpoints.maskgen import load_maskgen
from vgen.checkpoints.maskgit import load_maskgit
from vgen.checkpoints.nar import load_nar
from vgen.checkpoints.par import load_par
from vgen.checkpoints.randar import load_randar
from vgen.checkpoints.rar import load_rar
from vgen.checkpoints.release import build, make_plan_for, read_config, save_release
from vgen.checkpoints.titok import load_maskgit_vqgan
from vgen.errors import UserError, reported
from vgen.generators.conditioning import ClassCondition
from vgen.generators.transformer import Transformer
from vgen.schedules.plan import Plan
from vgen.tokenizers.maskgit_vqgan import MaskGITVQGAN

CONFIGS = Path(vgen.__file__).parents[1] / "configs"
VQ_PRESETS = ("vq16", "vq8", "maskgit_vqgan")
FAMILIES: dict[str, tuple[str, Callable[[Transformer, Path], None]]] = {
    "llamagen": ("raster", load_llamagen_gpt),
    "maskgen_kl": ("masked_random", load_maskgen),
    "maskgen_vq": ("masked", load_maskgen),
    "maskgit": ("masked", load_maskgit),
    "nar": ("neighboring", load_nar),
    "par": ("parallel", load_par),
    "randar": ("randar", load_randar),
    "rar": ("rar", load_rar),
}


def generator_preset(size: str) -> dict[str, Any]:
    """Constructor arguments that a preset of configs/generator sets, its parents' included.

    The parent ``base`` states the constructor's own defaults and is left out.

    Raises:
        UserError: for an unknown preset.
    """
    path = CONFIGS / "generator" / f"{size}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml") if not p.stem.endswith("base")))
        raise UserError(f"--size {size} is no preset; choose one of {names}")
    own = yaml.safe_load(path.read_text())
    parents = [name for name in own.pop("defaults", []) if name not in ("_self_", "base")]
    merged: dict[str, Any] = {}
    for parent in parents:
        merged |= generator_preset(parent)
    return merged | own


def import_tokenizer(file: Path, preset: str, image_size: int, out: Path) -> Path:
    """Write the release of a published tokenizer of LlamaGen, or of MaskGIT as RAR and RandAR use it.

    Args:
        file: such as ``vq_ds16_c2i.pt`` or ``maskgit-vqgan-imagenet-f16-256.bin``.
        preset: ``vq16``, ``vq8`` or ``maskgit_vqgan``.
        image_size: side in pixels of the images it will be used for.
        out: release folder.

    Raises:
        UserError: if the file does not fit the preset.
    """
    config = yaml.safe_load((CONFIGS / "tokenizer" / f"{preset}.yaml").read_text()) | {"image_size": image_size}
    tokenizer = build(config)
    try:
        if isinstance(tokenizer, MaskGITVQGAN):
            load_maskgit_vqgan(tokenizer, file)
        else:
            load_llamagen_vq(tokenizer, file)
    except UserError as error:
        others = ", ".join(name for name in VQ_PRESETS if name != preset)
        raise UserError(f"{error}; if it is another tokenizer, choose --vq-preset {others}") from error
    return save_release(out, tokenizer, config, kind="tokenizer", extra={"source": file.name})


def import_flextok(file: Path, out: Path) -> Path:
    """Write the release of a published FlexTok, configured by its own header.

    Args:
        file: ``model.safetensors`` of EPFL-VILAB/flextok_*.
        out: release folder.

    Raises:
        UserError: if the file is damaged or no FlexTok.
    """
    config = flextok_config(file)
    tokenizer = build(config)
    load_flextok(tokenizer, file)
    return save_release(out, tokenizer, config, kind="tokenizer", extra={"source": file.name})


def import_vae(file: Path, image_size: int, out: Path) -> Path:
    """Write the release of a published VAE, for ``task=flextok``.

    Args:
        file: ``diffusion_pytorch_model.safetensors`` of a diffusers AutoencoderKL, its ``config.json`` beside it.
        image_size: side in pixels of the images it will be used for.
        out: release folder.

    Raises:
        UserError: if the file is damaged or no AutoencoderKL.
    """
    config = published_vae_config(file, image_size=image_size)
    vae = build(config)
    load_published_vae(vae, file)
    return save_release(out, vae, config, kind="vae", extra={"source": file.name})


def import_generator(
    file: Path, family: str, size: str, tokenizer_release: Path, out: Path, options: dict[str, Any]
) -> Path:
    """Write the release of a published generator, class-conditional on ImageNet or conditional on text.

    Args:
        file: such as ``c2i_L_256.pt``.
        family: a key of ``FAMILIES``.
        size: a preset of configs/generator.
        tokenizer_release: release of its tokenizer, copied inside.
        out: release folder.
        options: options of the family's schedule, such as regions=4.

    Raises:
        UserError: if the file does not fit the preset, the schedule or the tokenizer's grid.
    """
    order, load = FAMILIES[family]
    sizes = generator_preset(size)
    tokenizer = build(read_config(tokenizer_release, "tokenizer")["network"])
    schedule = yaml.safe_load((CONFIGS / "schedule" / f"{order}.yaml").read_text()) | options
    condition = {
        "_target_": "vgen.generators.conditioning.ClassCondition",
        **sizes.get("condition", {}),
        "dim": sizes["dim"],
    }
    data: dict[str, Any] = {"name": "captions"}
    if get_class(condition["_target_"]) is ClassCondition:
        condition["num_classes"] = 1000
        data = {"name": "imagenet", "num_classes": 1000}
    plan: Plan = build(schedule)(grid=tokenizer.grid, num_condition=build(condition).num_slots)
    config = {
        **sizes,
        "_target_": "vgen.generators.transformer.Transformer",
        "vocab_size": tokenizer.codebook_size,
        "grid": list(tokenizer.grid),
        "condition": condition,
        "num_readouts": plan.num_heads,
        "num_learned": plan.num_learned,
        "position_queries": plan.has_queries,
        "mask_token": plan.masking is not None,
    }
    if "latent_head" in sizes:
        head = {"dim": sizes["dim"], "channels": tokenizer.latent_channels, "num_tokens": tokenizer.num_tokens}
        config["latent_head"] = {"width": sizes["dim"], **_without_links(sizes["latent_head"]), **head}
    generator = build(config)
    assert isinstance(generator, Transformer)
    load(generator, file)
    generator.check_plan(make_plan_for(generator, schedule))
    extra = {"schedule": schedule, "source": file.name, "data": data}
    return save_release(out, generator, config, kind="generator", extra=extra, tokenizer=tokenizer_release)


def _without_links(node: dict[str, Any]) -> dict[str, Any]:
    """Entries of a preset that state their own values; links such as ``${..dim}`` are for the configuration alone."""
    return {name: value for name, value in node.items() if not str(value).startswith("${")}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vgen.checkpoints",
        description="Turn published weights into release folders for sample.py and evaluate.py.",
        epilog="example: python -m vgen.checkpoints --vq vq_ds16_c2i.pt --generator c2i_L_256.pt --size l "
        "--image-size 256 --out releases/llamagen_l_256; RAR: --vq maskgit-vqgan-imagenet-f16-256.bin "
        "--vq-preset maskgit_vqgan --generator rar_b.bin --family rar --size rar_b --out releases/rar_b; "
        "MaskGen: --tokenizer releases/tatitok_bl128_vq --generator maskgen_vq_l.bin --family maskgen_vq "
        '--size maskgen_vq_l --schedule \'{"steps": 16, "noise_temperature": 2.0}\' --out releases/maskgen_vq_l',
    )
    tokenizers = parser.add_mutually_exclusive_group(required=True)
    tokenizers.add_argument("--vq", type=Path, help="tokenizer of LlamaGen (vq_ds16_c2i.pt, vq_ds8_c2i.pt) or MaskGIT")
    tokenizers.add_argument("--tokenizer", type=Path, help="release of the generator's tokenizer, imported earlier")
    tokenizers.add_argument("--flextok", type=Path, help="FlexTok, model.safetensors of EPFL-VILAB/flextok_*")
    tokenizers.add_argument("--vae", type=Path, help="diffusers AutoencoderKL, diffusion_pytorch_model.safetensors")
    parser.add_argument(
        "--vq-preset",
        choices=VQ_PRESETS,
        default=VQ_PRESETS[0],
        help="what --vq is; RAR and some RandAR weights speak the ids of maskgit_vqgan",
    )
    parser.add_argument("--image-size", type=int, default=256, help="side in pixels the weights were trained at")
    parser.add_argument("--generator", type=Path, help="generator; without it only the tokenizer")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llamagen")
    parser.add_argument("--size", default="l", help="preset of configs/generator: b, m, l, xl, xxl, 3b ...")
    parser.add_argument("--schedule", type=json.loads, default={}, help='schedule options as JSON, {"regions": 4}')
    parser.add_argument("--out", type=Path, required=True, help="release folder to write")
    chosen = parser.parse_args(arguments)
    if chosen.vq is None and chosen.tokenizer is None and chosen.generator is not None:
        parser.error("--generator needs --vq or --tokenizer: the tokenizer whose ids it speaks")
    if chosen.tokenizer is not None and chosen.generator is None:
        parser.error("--tokenizer is the tokenizer of a --generator; give one")
    with reported():
        if chosen.flextok is not None:
            print(f"release: {import_flextok(chosen.flextok, chosen.out)}")
            return
        if chosen.vae is not None:
            print(f"release: {import_vae(chosen.vae, chosen.image_size, chosen.out)}")
            return
        release = chosen.tokenizer
        if release is None:
            alone = chosen.generator is None
            tokenizer_out = chosen.out if alone else chosen.out.with_name(chosen.out.name + "_tokenizer")
            release = import_tokenizer(chosen.vq, chosen.vq_preset, chosen.image_size, tokenizer_out)
        if chosen.generator is not None:
            release = import_generator(
                chosen.generator, chosen.family, chosen.size, release, chosen.out, chosen.schedule
            )
        print(f"release: {release}")


if __name__ == "__main__":
    main()
