"""Crops, flips and conversions of single PIL images, with the exact numbers of the published pipelines."""

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.pixels import from_uint8

if TYPE_CHECKING:
    from PIL.Image import Image

CROPS = ("adm_center", "adm_random", "center", "random", "none")


def to_rgb(image: "Image") -> "Image":
    """Convert any PIL mode to 8-bit RGB.

    16-bit grey values are divided by 257 (PIL alone would clip them at 255), transparent pixels are laid over white,
    palettes and CMYK go through PIL's own tables.
    """
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        import numpy as np

        values = np.asarray(image).astype(np.float64)
        if image.mode != "I" or values.max(initial=0) > 255:
            values = values / 257
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _adm_resize(image: "Image", size: int) -> "Image":
    """Bring the smaller side to ``size``: halve with a box filter while at least twice as large, then bicubic."""
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    target = (round(image.width * scale), round(image.height * scale))
    return image.resize(target, resample=Image.Resampling.BICUBIC)


def _crop(image: "Image", left: int, top: int, size: int) -> "Image":
    return image.crop((left, top, left + size, top + size))


def adm_center_crop(image: "Image", size: int) -> "Image":
    """Centre crop of ADM (guided-diffusion ``center_crop_arr``), as used by DiT and LlamaGen.

    Args:
        image: RGB image of any size.
        size: side of the square result in pixels.
    """
    image = _adm_resize(image, size)
    return _crop(image, (image.width - size) // 2, (image.height - size) // 2, size)


def adm_random_crop(
    image: "Image", size: int, *, min_ratio: float = 0.8, max_ratio: float = 1.0, rng: random.Random
) -> "Image":
    """Random crop of ADM (guided-diffusion ``random_crop_arr``).

    Args:
        image: RGB image of any size.
        size: side of the square result in pixels.
        min_ratio: smallest share of the resized smaller side that the crop covers.
        max_ratio: largest share.
        rng: source of the three draws, in the order of the original: smaller side, top, left.
    """
    side = rng.randrange(math.ceil(size / max_ratio), math.ceil(size / min_ratio) + 1)
    image = _adm_resize(image, side)
    top = rng.randrange(image.height - size + 1)
    left = rng.randrange(image.width - size + 1)
    return _crop(image, left, top, size)


def resize_shorter(image: "Image", size: int) -> "Image":
    """Bring the shorter side to ``size`` with antialiased bicubic; the longer one is truncated as in torchvision."""
    from PIL import Image

    short = min(image.size)
    target = (int(size * image.width / short), int(size * image.height / short))
    return image if target == image.size else image.resize(target, resample=Image.Resampling.BICUBIC)


def center_crop(image: "Image", size: int) -> "Image":
    """Central ``size`` x ``size`` window with torchvision's rounding; the image must be at least that large."""
    return _crop(image, round((image.width - size) / 2), round((image.height - size) / 2), size)


def random_crop(image: "Image", size: int, *, rng: random.Random) -> "Image":
    """Uniformly placed ``size`` x ``size`` window; draws top, then left."""
    top = rng.randrange(image.height - size + 1)
    left = rng.randrange(image.width - size + 1)
    return _crop(image, left, top, size)


def flip(image: "Image") -> "Image":
    """Mirror left and right."""
    from PIL import Image

    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def five_crop(image: "Image", size: int) -> list["Image"]:
    """Top left, top right, bottom left, bottom right and centre windows, in this order."""
    right, bottom = image.width - size, image.height - size
    corners = [_crop(image, left, top, size) for top in (0, bottom) for left in (0, right)]
    return [*corners, center_crop(image, size)]


def ten_crop(image: "Image", size: int) -> list["Image"]:
    """TenCrop of torchvision: the five windows of the image, then the five windows of the mirrored image."""
    return [*five_crop(image, size), *five_crop(flip(image), size)]


def to_tensor(image: "Image") -> Tensor:
    """RGB image to uint8 [3, H, W]."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def to_pixels(image: "Image") -> Tensor:
    """RGB image to float32 [3, H, W] in [-1, 1] (ToTensor and Normalize with mean and std 0.5)."""
    return from_uint8(to_tensor(image))


@dataclass(frozen=True)
class ImageTransform:
    """The named crops as one picklable function of (image, random generator).

    Attributes:
        image_size: side of the square result in pixels; None keeps the native size (then ``crop`` must be ``none``).
        crop: ``adm_center`` and ``adm_random`` (ADM), ``center`` and ``random`` (shorter side resized, window cut),
            ``none`` (resized to a square without regard to the aspect).
        flip: mirror with probability 1/2.
    """

    image_size: int | None
    crop: str
    flip: bool

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise UserError(f"data.crop={self.crop} is unknown; choose one of {', '.join(CROPS)}")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"data.image_size={self.image_size} must be a positive number of pixels")
        if self.image_size is None and self.crop != "none":
            raise UserError(f"data.crop={self.crop} needs data.image_size; data.crop=none keeps the native size")

    @property
    def is_random_crop(self) -> bool:
        """Whether the crop differs from draw to draw."""
        return self.crop in ("adm_random", "random")

    def __call__(self, image: "Image", rng: random.Random | None = None) -> "Image":
        """Crop and flip an RGB image; without ``rng`` random crops become their central twin and nothing is flipped."""
        image = self._window(image, rng)
        return flip(image) if self.flip and rng is not None and rng.random() < 0.5 else image

    def _window(self, image: "Image", rng: random.Random | None) -> "Image":
        size = self.image_size
        if size is None:
            return image
        if self.crop == "none":
            from PIL import Image

            return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)
        if self.crop.startswith("adm"):
            if self.crop == "adm_center" or rng is None:
                return adm_center_crop(image, size)
            return adm_random_crop(image, size, rng=rng)
        image = resize_shorter(image, size)
        return center_crop(image, size) if self.crop == "center" or rng is None else random_crop(image, size, rng=rng)
