"""A tiny release on disk."""

from pathlib import Path

import torch

from vgen.checkpoints.release import build, save_release

TOKENIZER = {
    "_target_": "vgen.tokenizers.vqgan.VQGAN",
    "image_size": 8,
    "base_channels": 8,
    "encoder_multipliers": [1, 1],
    "decoder_multipliers": [1, 1],
    "num_res_blocks": 1,
    "z_channels": 8,
    "codebook_size": 16,
    "codebook_dim": 4,
    "norm_groups": 4,
}
GENERATOR = {
    "_target_": "vgen.generators.transformer.Transformer",
    "vocab_size": 16,
    "grid": [4, 4],
    "condition": {"_target_": "vgen.generators.conditioning.ClassCondition", "num_classes": 3, "dim": 16},
    "dim": 16,
    "depth": 1,
    "heads": 2,
    "ffn_multiple_of": 16,
}
SCHEDULE = {"_target_": "vgen.schedules.raster.raster", "_partial_": True}


RANDAR = {"_target_": "vgen.schedules.randar.randar", "_partial_": True, "steps": 6}


def tiny_release(
    folder: Path, *, generator: dict | None = None, tokenizer: dict | None = None, schedule: dict | None = None
) -> Path:
    """Write ``folder/tokenizer`` and ``folder/generator`` with random weights; returns the generator's release."""
    torch.manual_seed(0)
    token_config, config = TOKENIZER | (tokenizer or {}), GENERATOR | (generator or {})
    tokens = save_release(folder / "tokenizer", build(token_config), token_config, kind="tokenizer")
    network = build(config)
    torch.nn.init.normal_(network.outputs[0].weight)
    extra = {"schedule": schedule or SCHEDULE}
    return save_release(folder / "generator", network, config, kind="generator", extra=extra, tokenizer=tokens)
