"""Frechet video distance in the variants of the papers: detector, preparation of the clips, divisor of the covariance.

The variants give different numbers on the same clips (up to several percent at small counts), so a score carries the
variant's name. Facts: StyleGAN-V and LARP use the TorchScript detector, TATS, OmniTokenizer and Open-MAGVIT2 the
Kinetics-400 I3D of VideoGPT; common_metrics_on_video_quality ports one of each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vgen.errors import UserError
from vgen.evaluation.i3d import SIDE
from vgen.pixels import to_uint8

RANGE_SLACK = 1e-4  # rounding that a float clip in [0, 1] may carry


@dataclass(frozen=True)
class FVDVariant:
    """One paper's way to a Frechet video distance.

    Attributes:
        name: what scores are called after.
        detector: ``kinetics400`` (:mod:`vgen.evaluation.i3d`) or ``torchscript`` (``i3d_torchscript.pt``).
        quantise: how float clips become 8-bit first: ``round``, ``truncate`` or ``none``.
        fit: how frames reach 224 pixels: ``stretch`` (both sides, aspect ratio lost), ``crop`` (short side, then the
            centre) or ``detector`` (the TorchScript detector stretches inside).
        rescale: the TorchScript detector gets values 0..255 and maps them to [-1, 1] itself.
        ddof: the covariance is divided by n - ddof.
        source: where the variant was read.
    """

    name: str
    detector: str
    quantise: str
    fit: str
    rescale: bool
    ddof: int
    source: str

    def estimator(self) -> dict:
        """What a report must say about the estimator."""
        return {
            "fvd_variant": self.name,
            "fvd_detector": self.detector,
            "fvd_quantise": self.quantise,
            "fvd_fit": self.fit,
            "covariance_divisor": "n-1" if self.ddof else "n",
            "fvd_source": self.source,
        }


FVD_VARIANTS = {
    variant.name: variant
    for variant in (
        FVDVariant("stylegan_v", "torchscript", "round", "detector", True, 0, "universome/stylegan-v, fvd2048_16f"),
        FVDVariant("larp", "torchscript", "none", "detector", False, 0, "hywang66/LARP, eval"),
        FVDVariant("tats", "kinetics400", "truncate", "stretch", False, 1, "songweige/TATS; OmniTokenizer's rFVD"),
        FVDVariant("common_styleganv", "torchscript", "none", "crop", False, 1, "common_metrics, styleganv"),
        FVDVariant("common_videogpt", "kinetics400", "truncate", "crop", False, 1, "common_metrics, videogpt"),
    )
}


def fvd_variant(name: str) -> FVDVariant:
    """Look up a variant.

    Raises:
        UserError: naming those that exist.
    """
    if name not in FVD_VARIANTS:
        raise UserError(f"fvd variant {name} is unknown; choose one of {', '.join(FVD_VARIANTS)}")
    return FVD_VARIANTS[name]


def _frames(clips: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a change to every frame [B * T, 3, H, W] of clips [B, 3, T, H, W]."""
    count = len(clips)
    frames = change(clips.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (count, -1)).transpose(1, 2)


def _bilinear(frames: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(frames, size=size, mode="bilinear")


def _cropped(frames: Tensor, side: int) -> Tensor:
    """Bring the short side to ``side``, the long one rounded up, and cut the centre, offsets rounded down."""
    height, width = frames.shape[2:]
    scale = side / min(height, width)
    size = (side, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), side)
    frames = _bilinear(frames, size)
    top, left = (frames.shape[2] - side) // 2, (frames.shape[3] - side) // 2
    return frames[:, :, top : top + side, left : left + side]


def _levels(clips: Tensor, quantise: str) -> Tensor:
    """Clips as float32 levels 0..255, whole unless ``quantise`` is ``none``."""
    if clips.dtype == torch.uint8:
        return clips.float()
    if not clips.is_floating_point() or float(clips.min()) < -RANGE_SLACK or float(clips.max()) > 1 + RANGE_SLACK:
        raise UserError(
            f"clips to score must be uint8 0..255 or float in [0, 1], not {clips.dtype} from {clips.min():g} to "
            f"{clips.max():g}"
        )
    if quantise == "none":
        return clips.float() * 255
    if quantise == "truncate":
        return (clips.float() * 255).to(torch.uint8).float()
    return to_uint8(clips * 2 - 1).float()


def prepare_clips(clips: Tensor, variant: FVDVariant, *, side: int = SIDE) -> Tensor:
    """Bring clips into the form a variant's detector takes.

    Args:
        clips: uint8, or float in [0, 1], [B, C, T, H, W], C = 3 or 1 (grey clips are repeated).
        variant: see :data:`FVD_VARIANTS`.
        side: of the frames (224; other sizes for tests).

    Returns:
        float32 [B, 3, T, h, w], contiguous: in [-1, 1] and of ``side`` x ``side`` pixels, but for the variants whose
        detector resizes (the size stays) or rescales (values 0..255).

    Raises:
        UserError: for clips of another shape, type or range.
    """
    if clips.ndim != 5 or clips.shape[1] not in (1, 3):
        raise UserError(f"clips to score must be [clips, 3, frames, height, width], not {list(clips.shape)}")
    x = _levels(clips, variant.quantise).expand(-1, 3, -1, -1, -1)
    if variant.fit == "stretch":
        x = _frames(x, lambda frames: _bilinear(frames, (side, side)))
    elif variant.fit == "crop":
        x = _frames(x, lambda frames: _cropped(frames, side))
    return (x if variant.rescale else x / 127.5 - 1).contiguous()
