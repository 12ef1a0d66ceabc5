"""Every recipe composes, passes the checks made before work, and builds its networks."""

import pytest
import torch

from tests.generators.helpers import captions
from tests.paths import CONFIGS
from tests.training.helpers import composed
from vgen.generators.transformer import Transformer
from vgen.tokenizers.base import Autoencoder
from vgen.training.parts import complete_generator
from vgen.training.settings import check, make, resolve

RECIPES = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
TRAINERS = sorted(path.stem for path in (CONFIGS / "trainer").glob("*.yaml"))
PARAMETERS = {
    "llamagen_b": 110_888_448,
    "llamagen_l": 342_910_976,
    "llamagen_xl": 774_699_520,
    "llamagen_xxl": 1_410_972_672,
    "llamagen_3b": 3_096_659_200,
    "imagenet256_vq16": 71_883_403,
    "nar_b": 130_551_552,
    "nar_m": 295_453_696,
    "nar_l": 372_536_320,
    "nar_xl": 815_991_040,
    "nar_xxl": 1_464_454_656,
    "par_l": 342_914_048,
    "randar_l": 342_912_000,
    "randar_xl": 774_700_800,
    "randar_xxl": 1_410_974_208,
    "ucf101_larp": 193_880_224,
    # The published 177,227,008 without BERT's two token types, which are part of our positions.
    "maskgit_b64": 177_227_008 - 2 * 768,
    "larp_ar_l": 326_261_760,
    "larp_ar_lp": 631_975_680,
    "larp_ar_k600": 633_157_120,
    "nar_video_l": 368_736_256,
    "nar_video_lp": 693_588_480,
    # The published numbers, of the VQ models without the 1,001 unused rows of their token table.
    "maskgen_vq_l": 604_311_552 - 1001 * 1024,
    "maskgen_vq_xl": 1_176_611_840 - 1001 * 1280,
    "maskgen_kl_l": 641_364_000,
    "maskgen_kl_xl": 1_237_345_312,
}
# Tokenizers that generator recipes expect as a release.
TOKENS = {
    "digits_raster": (256, (4, 4), 10),
    "digits_maskgit": (256, (4, 4), 10),
    "cifar10_raster": (4096, (8, 8), 10),
    "cifar10_maskgit": (4096, (8, 8), 10),
    "maskgit_b64": (4096, (64,), 1000),
    "digits_flextok_ar": (200, (16,), 10),
    "cifar10_flextok_ar": (12800, (64,), 10),
    "imagenet256_flextok_ar": (64000, (256,), 1000),
    **{f"maskgen_vq_{size}": (8192, (128,), 2) for size in ("l", "xl")},
    **{f"maskgen_kl_{size}": (0, (32,), 2) for size in ("l", "xl")},
    **{f"larp_ar_{size}": (8192, (1024,), 101) for size in ("l", "lp", "k600")},
    **{f"nar_video_{size}": (8192, (4, 16, 16), 101) for size in ("l", "lp")},
    **{f"moving_digits_{kind}": (240, (3, 6, 6), 10) for kind in ("raster", "neighboring", "parallel", "prediction")},
}


def settings_of(recipe: str) -> dict:
    needed = [] if "digits" in recipe else ["data.path=/somewhere", "++task.tokenizer=/release"]
    if recipe.startswith("maskgen"):
        needed.append("task.text_features=/texts.safetensors")
    return resolve(composed(f"experiment={recipe}", *needed))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_builds(recipe):
    settings = settings_of(recipe)
    check(settings)
    assert settings["run_name"] == recipe
    assert settings["run_dir"] == f"runs/{recipe}"
    make(settings["task"]["lr_schedule"], "task.lr_schedule")
    if settings["task"]["name"] != "generator":
        kind, key, arguments = Autoencoder, "tokenizer", settings["tokenizer"]
    else:
        vocabulary, grid, classes = TOKENS.get(recipe, (16384, (16, 16), 1000))
        kind, key = Transformer, "generator"
        arguments = complete_generator(
            settings["generator"],
            settings["schedule"],
            vocab_size=vocabulary,
            grid=grid,
            num_classes=classes,
            codebook_dim=8,
            latent_channels=0 if vocabulary else 16,
            texts=captions(classes, features=77, width=768, pooled=768) if recipe.startswith("maskgen") else None,
        )
    with torch.device("meta"):
        network = make(arguments, key)
    assert isinstance(network, kind)
    if recipe in PARAMETERS:
        assert sum(p.numel() for p in network.parameters()) == PARAMETERS[recipe]


# A preset with an open entry is the base of others.
PRESETS = sorted(path.stem for path in (CONFIGS / "tokenizer").glob("*.yaml") if "???" not in path.read_text())


@pytest.mark.parametrize("preset", PRESETS)
def test_tokenizer_preset_builds(preset):
    with torch.device("meta"):
        network = make(resolve(composed(f"tokenizer={preset}"))["tokenizer"], "tokenizer")
    assert isinstance(network, Autoencoder)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_opens_with_its_command(recipe):
    lines = (CONFIGS / "experiment" / f"{recipe}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# python train.py experiment={recipe}")


@pytest.mark.parametrize(
    ("trainer", "logger"),
    [*((trainer, "csv") for trainer in TRAINERS), *(("cpu", logger) for logger in ("tensorboard", "wandb", "none"))],
)
def test_trainers_and_loggers_compose(trainer, logger):
    settings = resolve(composed(f"trainer={trainer}", f"logger={logger}"))
    if isinstance(settings["trainer"]["strategy"], dict):
        make(settings["trainer"]["strategy"], "trainer.strategy")
    assert "csv" in settings["logger"]
    assert (settings["logger"]["csv"] is None) == (logger == "none")


def test_larger_recipes_differ_from_the_smallest_in_what_they_say():
    base, large = settings_of("llamagen_b"), settings_of("llamagen_xxl")
    assert large["task"] | {"lr_schedule": None} == base["task"] | {"lr_schedule": None}
    assert large["generator"]["dim"] == 1536
    assert large["trainer"]["strategy"]["_target_"] == "vgen.training.sharding.fsdp"
    assert large["trainer"]["max_steps"] == 250_228
