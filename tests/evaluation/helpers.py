"""What the evaluation tests share: golden cases, tiny extractors, tiny picture sets."""

from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from tests import paths
from tests.paths import CONFIGS
from vgen.checkpoints.release import build, save_release

GOLDEN = paths.GOLDEN / "evaluation"
CLASSES = 4


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


class TinyExtractor(nn.Module):
    """Features = mean of every colour in every quadrant (12); logits = one-hot of the quadrant that is brightest."""

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        quadrants = nn.functional.adaptive_avg_pool2d(pictures.float(), 2) / 255
        return quadrants.flatten(1), quadrants.mean(1).flatten(1) * 4


class FeaturesOnly(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(pictures.float(), 2).flatten(1)


def save_script(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


def quadrant_pictures(
    count: int, *, seed: int, size: int = 12, contrast: float = 90.0
) -> tuple[np.ndarray, np.ndarray]:
    """Noise with one brighter quadrant, whose number is the label: uint8 [n, size, size, 3] and int64 [n]."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    pictures = rng.uniform(0, 120, (count, size, size, 3))
    half = size // 2
    for picture, label in zip(pictures, labels, strict=True):
        row, column = divmod(int(label), 2)
        picture[row * half : (row + 1) * half, column * half : (column + 1) * half] += contrast
    return pictures.astype(np.uint8), labels


def save_npz(path: Path, count: int, *, seed: int, labels: bool = True, **options) -> Path:
    pictures, classes = quadrant_pictures(count, seed=seed, **options)
    arrays = (pictures, classes) if labels else (pictures,)
    np.savez(path, *arrays)
    return path


def save_tokenizer(folder: Path) -> Path:
    """A random tokenizer of 12x12 pictures with 36 tokens and 16 codes as a release folder."""
    config = {
        "_target_": "vgen.tokenizers.vqgan.VQGAN",
        "image_size": 12,
        "base_channels": 8,
        "encoder_multipliers": [1, 1],
        "decoder_multipliers": [1, 1],
        "num_res_blocks": 1,
        "z_channels": 8,
        "codebook_size": 16,
        "codebook_dim": 4,
        "norm_groups": 4,
    }
    torch.manual_seed(0)
    return save_release(folder, build(config), config, kind="tokenizer")


def save_generator(folder: Path, tokenizer: Path) -> Path:
    """A random class-conditional generator over that tokenizer as a release folder."""
    config = {
        "_target_": "vgen.generators.transformer.Transformer",
        "vocab_size": 16,
        "grid": [6, 6],
        "condition": {"_target_": "vgen.generators.conditioning.ClassCondition", "num_classes": CLASSES, "dim": 16},
        "num_readouts": 1,
        "num_learned": 0,
        "dim": 16,
        "depth": 1,
        "heads": 2,
        "ffn_multiple_of": 16,
    }
    torch.manual_seed(0)
    schedule = {"_target_": "vgen.schedules.raster.raster", "_partial_": True}
    return save_release(
        folder, build(config), config, kind="generator", extra={"schedule": schedule}, tokenizer=tokenizer
    )


def compose_config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("evaluate", list(overrides))
