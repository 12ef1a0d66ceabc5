"""PSNR and SSIM of 8-bit pictures, one value per picture."""

import torch
from torch import Tensor
from torch.nn import functional as F

PSNR_CAP = 100.0  # decibels given to an exact copy (as OmniTokenizer does), whose PSNR would be infinite
SSIM_WINDOW = 11


def psnr(pictures: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per picture.

    Args:
        pictures: uint8 [B, C, H, W].
        originals: uint8, same shape.

    Returns:
        float64 [B], 10 log10(255^2 / MSE) in dB, at most :data:`PSNR_CAP`. The published figure is the mean over
        pictures, not the value of the pooled error.
    """
    error = (pictures.double() - originals.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(255.0**2 / error)).clamp(max=PSNR_CAP)


def _window(dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.arange(SSIM_WINDOW, dtype=dtype, device=device) - SSIM_WINDOW // 2
    weight = torch.exp(-x.square() / (2 * 1.5**2))
    return weight / weight.sum()


def ssim(pictures: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity per picture (Wang et al. 2004).

    11 x 11 Gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03, population covariance, valid region only, per channel
    and then averaged: equal to scikit-image's gaussian variant and to the OpenCV code of OmniTokenizer.

    Args:
        pictures: uint8 [B, C, H, W], H and W at least 11.
        originals: uint8, same shape.

    Returns:
        float64 [B], at most 1.
    """
    x, y = pictures.double() / 255, originals.double() / 255
    weight = _window(x.dtype, x.device)

    def smooth(image: Tensor) -> Tensor:
        flat = image.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    value = luminance * (2 * covariance + c2) / (var_x + var_y + c2)
    return value.flatten(1).mean(1).view(len(pictures), -1).mean(1)
