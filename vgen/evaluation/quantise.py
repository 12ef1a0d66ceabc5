"""The rules by which published code turns float pictures into 8-bit ones, for parity with its numbers.

vgen itself rounds half up everywhere (:func:`vgen.pixels.to_uint8`). Truncating rules darken by half a level on
average, and do not return an 8-bit picture that went through [-1, 1].
"""

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.pixels import to_uint8

QUANTISE_RULES = ("round", "adm", "mar", "titok", "save_image")


def quantise(pixels: Tensor, rule: str = "round") -> Tensor:
    """Turn pixels into 8 bits.

    Args:
        pixels: float [...], nominally in [-1, 1].
        rule: ``round`` rounds half up (LlamaGen, PAR, NAR, ZipAR, DiT, StyleGAN, and vgen); ``adm`` truncates
            127.5 (x + 1); ``mar`` rounds half to even; ``titok`` truncates 255 clip((x + 1) / 2) (TiTok, RAR,
            OmniTokenizer, LARP's files); ``save_image`` is torchvision's.

    Returns:
        uint8 tensor of the same shape.

    Raises:
        UserError: if the rule is unknown.
    """
    if rule not in QUANTISE_RULES:
        raise UserError(f"quantise={rule} is unknown; choose one of {', '.join(QUANTISE_RULES)}")
    if rule == "round":
        return to_uint8(pixels)
    if rule == "adm":
        return ((pixels + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    unit = ((pixels + 1) / 2).clamp(0, 1)
    if rule == "mar":
        return (unit * 255).round().to(torch.uint8)
    offset = 0.5 if rule == "save_image" else 0.0
    return (unit * 255 + offset).clamp(0, 255).to(torch.uint8)
