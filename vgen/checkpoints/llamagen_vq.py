"""Published LlamaGen tokenizers (VQ-8, VQ-16), their discriminators and LPIPS (LlamaGen section 9).

Our module names are the published ones, so the map only drops what is not a weight.
"""

import argparse
from pathlib import Path

import torch

from vgen.checkpoints.convert import StateDict, load_strict, read_weights, unwrap
from vgen.losses.adversarial import PatchGAN, StyleGANDiscriminator
from vgen.losses.perceptual import LPIPS
from vgen.tokenizers.vqgan import VQGAN

_USAGE = "quantize.codebook_used"


def to_ours(state: StateDict, tokenizer: VQGAN) -> StateDict:
    """Replace the published usage queue, present or not, by an empty one of the tokenizer's own length."""
    weights = {name: value for name, value in state.items() if name != _USAGE}
    return weights | {_USAGE: torch.zeros_like(tokenizer.quantize.codebook_used)}


def to_published(state: StateDict) -> StateDict:
    """Names as published, with the usage queue in the published type."""
    return {name: value.float() if name == _USAGE else value for name, value in state.items()}


def load_llamagen_vq(tokenizer: VQGAN, path: str | Path) -> None:
    """Load a published file such as ``vq_ds16_c2i.pt``.

    Args:
        tokenizer: built from the matching preset, ``tokenizer=vq16`` or ``tokenizer=vq8``.
        path: the published file; the state dict may be nested under ema (preferred) or model, or flat.

    Raises:
        UserError: for an unreadable file or any difference in names or shapes.
    """
    state = unwrap(_read(path), keys=("ema", "model"), path=path)
    load_strict(tokenizer, to_ours(state, tokenizer), what=str(path))


def load_llamagen_discriminator(discriminator: PatchGAN | StyleGANDiscriminator, path: str | Path) -> None:
    """Load the discriminator out of a tokenizer training checkpoint of the original, or a flat state dict.

    Raises:
        UserError: for an unreadable file or any difference in names or shapes.
    """
    state = unwrap(_read(path), keys=("discriminator",), path=path)
    load_strict(discriminator, state, what=str(path))


def load_lpips_state(lpips: LPIPS, path: str | Path) -> None:
    """Load LPIPS saved as one state dict, trunk and heads together; the two input constants may be absent.

    Raises:
        UserError: for an unreadable file or any difference in names or shapes.
    """
    constants = lpips.scaling_layer.state_dict(prefix="scaling_layer.")
    load_strict(lpips, constants | unwrap(_read(path), keys=("model",), path=path), what=str(path))


def _read(path: str | Path) -> object:
    # The original's training checkpoints also hold their command line, an argparse.Namespace.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return read_weights(path)
