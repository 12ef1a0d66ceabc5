import pytest
import torch
import yaml
from omegaconf import OmegaConf

from tests.paths import CONFIGS
from vgen.checkpoints.__main__ import generator_preset
from vgen.generators.conditioning import ClassCondition, TextContext
from vgen.generators.transformer import Transformer

PUBLISHED = {
    "b": 110_888_448,
    "l": 342_910_976,
    "xl": 774_699_520,
    "xxl": 1_410_972_672,
    "xxxl": 3_893_027_840,
    "1b": 1_199_616_000,
    "3b": 3_096_659_200,
    "7b": 6_614_589_440,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_exactly_the_published_number_of_parameters(name):
    config = yaml.safe_load((CONFIGS / "generator" / f"{name}.yaml").read_text())
    sizes = {key: config[key] for key in ("dim", "depth", "heads")}
    with torch.device("meta"):
        condition = ClassCondition(num_classes=1000, dim=sizes["dim"])
        generator = Transformer(vocab_size=16384, grid=(16, 16), condition=condition, **sizes)
    assert sum(parameter.numel() for parameter in generator.parameters()) == PUBLISHED[name]


# The published smallest and largest DAR have 485 M and 2.0 B; shapes are inferred, so the counts are only near.
INFERRED = {"dar_l": 484, "dar_xl": 1120, "dar_xxl": 2070}


@pytest.mark.parametrize("name", INFERRED)
def test_an_inferred_preset_has_about_the_size_the_sheet_estimates(name):
    settings = OmegaConf.load(CONFIGS / "generator" / f"{name}.yaml")
    for parent in ("dar_l", "base"):
        settings = OmegaConf.merge(OmegaConf.load(CONFIGS / "generator" / f"{parent}.yaml"), settings)
    options = OmegaConf.to_container(settings, resolve=False)
    condition = {"num_classes": 1000, "dim": options["dim"]}
    given = {key: value for key, value in options.items() if key not in ("defaults", "_target_", "condition")}
    given |= {"codebook_dim": 256, "directions": [[0, 1], [1, 0], [1, -1], [-1, 1]]}
    with torch.device("meta"):
        generator = Transformer(vocab_size=16384, grid=(16, 16), condition=ClassCondition(**condition), **given)
    millions = sum(parameter.numel() for parameter in generator.parameters()) / 1e6
    assert millions == pytest.approx(INFERRED[name], rel=0.03)


# Millions of parameters of the blocks, as the paper counts (arXiv 2502.13967); hidden widths are rounded up a little.
FLEXTOK = {
    "flextok_ar_d10": 49.15,
    "flextok_ar_d12": 84.93,
    "flextok_ar_d16": 201.3,
    "flextok_ar_d20": 393.2,
    "flextok_ar_d24": 679.5,
    "flextok_ar_d30": 1327.1,
    "flextok_ar_text_d12": 113.2,
    "flextok_ar_text_d18": 382.2,
    "flextok_ar_text_d26": 1151.9,
    "flextok_ar_text_d36": 3057.6,
}


@pytest.mark.parametrize("name", FLEXTOK)
def test_generators_for_flextok_have_the_size_the_paper_gives(name):
    preset = generator_preset(name)
    given = {key: value for key, value in preset.items() if key not in ("_target_", "condition")}
    with torch.device("meta"):
        condition = ClassCondition(num_classes=1000, dim=given["dim"])
        if "text" in name:
            assert preset["condition"]["_target_"].endswith("TextContext")
            condition = TextContext(caption_dim=2048, num_features=77, dim=given["dim"])
        generator = Transformer(vocab_size=64000, grid=(256,), condition=condition, **given)
    millions = sum(parameter.numel() for parameter in generator.layers.parameters()) / 1e6
    assert millions == pytest.approx(FLEXTOK[name], rel=0.003)


SMALL = {
    "base",
    "digits",
    "maskgit_digits",
    "moving_digits",
    "s",
    "video",
    "flextok_ar_base",
    "flextok_ar_digits",
    "flextok_ar_text_base",
}


def test_every_preset_is_checked_or_small():
    names = {path.stem for path in (CONFIGS / "generator").glob("*.yaml")}
    # Those of RAR, MaskGIT, MaskGen, NAR's video and LARP's generators are compared with the manifests of the files.
    by_manifest = {"m", "rar_base", "rar_b", "rar_l", "rar_xl", "rar_xxl", "maskgit_vit", "maskgit_uvit"}
    by_manifest |= {"nar_video_l", "nar_video_lp", "larp_ar_l", "larp_ar_lp"}
    by_manifest |= {"maskgen_base", "maskgen_vq_l", "maskgen_vq_xl", "maskgen_kl_l", "maskgen_kl_xl"}
    assert names - set(PUBLISHED) - set(INFERRED) - set(FLEXTOK) - by_manifest == SMALL
