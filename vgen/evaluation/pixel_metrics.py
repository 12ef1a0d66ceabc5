"""PSNR and SSIM of 8-bit pictures, one value per picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vgen.errors import UserError

PSNR_CAP = 100.0  # decibels given to an exact copy (as OmniTokenizer does), whose PSNR would be infinite
SSIM_WINDOW = 11


def _squared_error(pictures: Tensor, originals: Tensor) -> Tensor:
    """Mean squared error per picture on the scale 0..255, float64 [B]."""
    return (pictures.double() - originals.double()).square().flatten(1).mean(1)


def psnr(pictures: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per picture (or per clip, if the tensors are clips).

    Args:
        pictures: uint8 [B, C, ..., H, W].
        originals: uint8, same shape.

    Returns:
        float64 [B], 10 log10(255^2 / MSE) in dB, at most :data:`PSNR_CAP`. The published figure is the mean over
        pictures, not the value of the pooled error.
    """
    return (10 * torch.log10(255.0**2 / _squared_error(pictures, originals))).clamp(max=PSNR_CAP)


def pooled_psnr(pictures: Tensor, originals: Tensor) -> float:
    """One PSNR of the error pooled over all pictures: torchmetrics' default, another number than the mean of values."""
    error = _squared_error(pictures, originals).mean()
    return float((10 * torch.log10(255.0**2 / error)).clamp(max=PSNR_CAP))


@dataclass(frozen=True)
class SSIMConvention:
    """How a structural similarity is averaged; conventions differ by more than 1 %.

    Attributes:
        weights: one-dimensional window, whose product with itself weighs the neighbourhood of a pixel.
        data_range: largest difference of values on the scale [0, 1]; LlamaGen passes 2, which inflates the number.
        sample_covariance: divide variances by N - 1 instead of N.
        padded: average the whole map of a reflect-padded picture instead of the region without padding.
    """

    weights: Sequence[float]
    data_range: float = 1.0
    sample_covariance: bool = False
    padded: bool = False


_GAUSSIAN = torch.exp(-(torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2).square() / (2 * 1.5**2))
_GAUSSIAN_WEIGHTS = (_GAUSSIAN / _GAUSSIAN.sum()).tolist()
_UNIFORM_WEIGHTS = [1 / 7] * 7

SSIM_CONVENTIONS = {
    "gaussian": SSIMConvention(_GAUSSIAN_WEIGHTS),
    "uniform": SSIMConvention(_UNIFORM_WEIGHTS, sample_covariance=True),
    "llamagen": SSIMConvention(_UNIFORM_WEIGHTS, sample_covariance=True, data_range=2.0),
    "torchmetrics": SSIMConvention(_GAUSSIAN_WEIGHTS, padded=True),
}


def ssim(pictures: Tensor, originals: Tensor, *, convention: str = "gaussian") -> Tensor:
    """Structural similarity per picture (Wang et al. 2004), K1 = 0.01, K2 = 0.03, per channel and then averaged.

    Args:
        pictures: uint8 [B, C, H, W], H and W at least the window (11; 7 for the uniform ones).
        originals: uint8, same shape.
        convention: ``gaussian`` is the number of the literature: 11 x 11 Gaussian window with sigma 1.5, population
            covariance, region without padding (scikit-image's gaussian variant, the OpenCV code of OmniTokenizer).
            ``uniform`` is scikit-image's default 7 x 7 window, ``llamagen`` the same with its doubled data range,
            ``torchmetrics`` the whole padded map.

    Returns:
        float64 [B], at most 1.

    Raises:
        UserError: if the convention is unknown.
    """
    if convention not in SSIM_CONVENTIONS:
        raise UserError(f"ssim convention {convention} is unknown; choose one of {', '.join(SSIM_CONVENTIONS)}")
    rule = SSIM_CONVENTIONS[convention]
    x, y = pictures.double() / 255, originals.double() / 255
    weight = torch.tensor(rule.weights, dtype=x.dtype, device=x.device)
    count = len(weight) ** 2
    spread = count / (count - 1) if rule.sample_covariance else 1.0

    def smooth(image: Tensor) -> Tensor:
        if rule.padded:
            image = F.pad(image, (len(weight) // 2,) * 4, mode="reflect")
        flat = image.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = spread * (smooth(x * x) - mean_x**2), spread * (smooth(y * y) - mean_y**2)
    covariance = spread * (smooth(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * rule.data_range) ** 2, (0.03 * rule.data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    value = luminance * (2 * covariance + c2) / (var_x + var_y + c2)
    return value.flatten(1).mean(1).view(len(pictures), -1).mean(1)
