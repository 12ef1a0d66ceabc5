"""Conversions between the pixel range of the networks and 8-bit pictures."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid


def to_uint8(pixels: Tensor) -> Tensor:
    """Round pixels to 8 bits.

    Args:
        pixels: float [...], nominally in [-1, 1]; values outside are clamped.

    Returns:
        uint8 tensor of the same shape: clamp(127.5 x + 128, 0, 255) truncated, which is rounding half up and the exact
        inverse of :func:`from_uint8` (the rule of LlamaGen, DiT and StyleGAN).
    """
    return pixels.float().mul(127.5).add(128).clamp(0, 255).to(torch.uint8)


def resize_pixels(pixels: Tensor, size: int) -> Tensor:
    """Resize float pixels [B, 3, H, W] to [B, 3, size, size]: bicubic without antialiasing, before rounding to 8 bits.

    The rule by which LlamaGen and PAR bring 384-pixel samples to 256 for their scores (LlamaGen section 6).
    """
    return F.interpolate(pixels, size=(size, size), mode="bicubic")


def from_uint8(pictures: Tensor) -> Tensor:
    """Map uint8 values 0..255 to float32 in [-1, 1]."""
    return pictures.to(torch.float32, copy=True).div_(127.5).sub_(1)


def frames_of(pixels: Tensor) -> Tensor:
    """Clips [B, C, T, H, W] as their frames [B * T, C, H, W], clip by clip; pictures [B, C, H, W] as they are."""
    return pixels.transpose(1, 2).flatten(0, 1) if pixels.dim() == 5 else pixels


def save_grid(pictures: Tensor, path: str | Path, *, columns: int, scale: int = 1) -> Path:
    """Write pictures as one PNG grid.

    Args:
        pictures: uint8 [B, 3, H, W].
        path: file to write; its folder is made if needed.
        columns: pictures per row.
        scale: integer magnification (nearest neighbour), for pictures too small to look at.

    Returns:
        The path written.
    """
    from PIL import Image

    grid = make_grid(pictures.cpu(), nrow=columns, padding=1 if scale > 1 else 2, pad_value=255)
    grid = grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)
    return path
