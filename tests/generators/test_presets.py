import pytest
import torch
import yaml

from tests.paths import CONFIGS
from vgen.generators.conditioning import ClassCondition
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


def test_every_preset_is_checked_or_small():
    names = {path.stem for path in (CONFIGS / "generator").glob("*.yaml")}
    assert names - set(PUBLISHED) == {"base", "digits", "s", "m"}
