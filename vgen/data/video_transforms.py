"""Resizing, cropping and padding of clips, with the numbers of LARP's pipeline (which NAR shares)."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vgen.errors import UserError

CROPS = ("center", "random", "none")


def _resized(frames: Tensor, height: int, width: int) -> Tensor:
    if frames.shape[-2:] == (height, width):
        return frames
    return F.interpolate(frames, size=(height, width), mode="bilinear", antialias=True, align_corners=False)


@dataclass(frozen=True)
class ClipTransform:
    """Frames of any size to square frames, the same window and mirroring for all frames of a clip.

    Attributes:
        image_size: side of the square result in pixels.
        crop: ``center`` and ``random`` (shorter side resized, window cut) or ``none`` (resized to a square without
            regard to the aspect).
        flip: mirror with probability 1/2.
    """

    image_size: int
    crop: str
    flip: bool

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise UserError(f"data.crop={self.crop} is unknown; choose one of {', '.join(CROPS)}")
        if self.image_size < 1:
            raise UserError(f"data.image_size={self.image_size} must be a positive number of pixels")

    def __call__(self, frames: Tensor, rng: random.Random | None = None) -> Tensor:
        """Transform frames.

        Args:
            frames: uint8 [T, H, W, 3].
            rng: source of window and mirroring (drawn in the order top, left, mirror); without it the window is the
                central one and nothing is mirrored.

        Returns:
            float32 [3, T, S, S], values 0..1, not rounded.
        """
        pixels = frames.permute(0, 3, 1, 2).float() / 255
        size, (height, width) = self.image_size, pixels.shape[-2:]
        if self.crop == "none":
            pixels = _resized(pixels, size, size)
        else:
            short = min(height, width)
            pixels = _resized(pixels, int(size * height / short), int(size * width / short))
            spare = [side - size for side in pixels.shape[-2:]]
            if self.crop == "random" and rng is not None:
                top, left = (rng.randrange(extra + 1) for extra in spare)
            else:
                top, left = (round(extra / 2) for extra in spare)
            pixels = pixels[..., top : top + size, left : left + size]
        if self.flip and rng is not None and rng.random() < 0.5:
            pixels = pixels.flip(-1)
        return pixels.transpose(0, 1).contiguous()


def pad_frames(clip: Tensor, length: int) -> Tensor:
    """Repeat the last frame of a clip [3, T, H, W] (or batch [B, 3, T, H, W]) until it has ``length`` frames."""
    missing = length - clip.shape[-3]
    if missing <= 0:
        return clip
    return torch.cat([clip, *[clip[..., -1:, :, :]] * missing], dim=-3)


def first_frames(clips: Tensor, given: int) -> Tensor:
    """The condition of LARP's frame prediction: the first ``given`` frames, then the last of them to the old length.

    Args:
        clips: [B, 3, T, H, W].
        given: frames that are given.
    """
    return pad_frames(clips[:, :, :given], clips.shape[2])
