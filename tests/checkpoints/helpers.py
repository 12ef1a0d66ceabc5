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


CLIP_TOKENIZER = {
    "_target_": "vgen.tokenizers.causal3d.Causal3D",
    "image_size": 8,
    "num_frames": 5,
    "patch_size": 2,
    "base_channels": 4,
    "multipliers": [1, 1],
    "time_strides": [2],
    "space_strides": [2],
    "num_res_blocks": 1,
    "z_channels": 4,
    "quantizer": {"_target_": "vgen.tokenizers.fsq.FSQ", "levels": [4, 4]},
    "norm_groups": 2,
    "time_padding": "first",
    "gradient_checkpointing": False,
}
CLIP_GENERATOR = GENERATOR | {"grid": [3, 2, 2]}
FRAMES = {"_target_": "vgen.generators.conditioning.TokenCondition", "num_tokens": 12, "dim": 16}
PREDICTOR = CLIP_GENERATOR | {"condition": FRAMES, "rope": "none", "positions": "own"}
"""Goes on from the first 3 of 5 frames; its schedule is raster."""
MOVING_DIGITS = {
    "_target_": "vgen.data.moving_digits.moving_digits",
    "image_size": 8,
    "num_frames": 5,
    "digit_size": 5,
    "num_digits": 1,
    "min_speed": 1.0,
    "max_speed": 2.0,
    "train_clips": 20,
    "val_clips": 20,
    "fresh": True,
    "val_fraction": 0.165,
    "seed": 0,
}


def clip_release(folder: Path, *, predicts: bool = False, schedule: dict | None = None, **generator: object) -> Path:
    """A release of clips of 5 frames of 8x8 pixels, 12 tokens; ``predicts``: goes on from the first 3 frames."""
    torch.manual_seed(0)
    tokenizer = build(CLIP_TOKENIZER)
    # Latents far apart, so that different frames have different codes.
    tokenizer.quant_conv.weight.data.mul_(100.0)
    tokens = save_release(folder / "tokenizer", tokenizer, CLIP_TOKENIZER, kind="tokenizer")
    config = (PREDICTOR if predicts else CLIP_GENERATOR) | generator
    network = build(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    extra = {
        "schedule": schedule or SCHEDULE,
        "given_frames": 3 if predicts else None,
        "data": {"name": "moving-digits", "num_classes": 3, "fps": 10.0},
        "training": {"data": MOVING_DIGITS, "task": {"condition_dropout": 0.0}},
    }
    return save_release(folder / "generator", network, config, kind="generator", extra=extra, tokenizer=tokens)
