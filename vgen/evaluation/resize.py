"""The ways in which evaluation code brings 8-bit pictures to the size of a feature network.

They give different scores on the same pictures, so a score names its mode. Published FIDs use ``tf1_bilinear``.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vgen.errors import UserError

RESIZE_MODES = ("tf1_bilinear", "legacy_pytorch", "antialias", "clean", "pil_bicubic")


def resize_pictures(pictures: Tensor, size: int, mode: str) -> Tensor:
    """Resize pictures to a square, the aspect ratio is not kept.

    Args:
        pictures: uint8 [B, 3, H, W].
        size: side of the result.
        mode: ``tf1_bilinear`` samples at i * in / out without half-pixel shift or antialiasing (TensorFlow 1, ADM
            suite, torch-fidelity, TiTok); ``legacy_pytorch`` is bilinear with half-pixel centres, without antialiasing
            (pytorch-fid, LARP's FID); ``antialias`` the same with antialiasing (torchmetrics' default); ``clean`` is
            Pillow's bicubic on float channels, clipped (clean-fid); ``pil_bicubic`` the same rounded to 8 bits.

    Returns:
        float32 [B, 3, size, size] in 0..255, on the device of ``pictures``.

    Raises:
        UserError: if the mode is unknown.
    """
    assert pictures.dtype == torch.uint8, pictures.dtype
    if mode not in RESIZE_MODES:
        raise UserError(f"resize mode {mode} is unknown; choose one of {', '.join(RESIZE_MODES)}")
    if mode == "tf1_bilinear":
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        return interpolate_bilinear_2d_like_tensorflow1x(pictures.float(), size=(size, size), align_corners=False)
    if mode in ("legacy_pytorch", "antialias"):
        return F.interpolate(pictures.float(), size=(size, size), mode="bilinear", antialias=mode == "antialias")
    resized = [_bicubic(picture, size, rounded=mode == "pil_bicubic") for picture in pictures.cpu()]
    return torch.stack(resized).to(pictures.device)


def _bicubic(picture: Tensor, size: int, *, rounded: bool) -> Tensor:
    """Pillow's antialiased bicubic of one picture uint8 [3, H, W] as float32 [3, size, size]."""
    from PIL import Image

    if rounded:
        image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    channels = [
        np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC))
        for channel in picture.float().numpy()
    ]
    return torch.from_numpy(np.stack(channels)).clamp(0, 255)
