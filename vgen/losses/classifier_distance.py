"""Perceptual distance between the logits of an ImageNet classifier, the perceptual loss of TiTok."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.losses.weight_files import find_weights, read_weight_file, search_folders

CONVNEXT_FILES = ("convnext_small-0c510722.pth",)
_SIDE = 224


class ClassifierDistance(nn.Module):
    """Mean squared difference of the logits that a frozen classifier gives two images.

    Args:
        network: from normalised images [B, 3, 224, 224] to logits [B, classes]; put in evaluation mode for good.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "ClassifierDistance":
        """Stay in evaluation mode whatever the surrounding training loop does."""
        return super().train(False)

    def logits(self, pixels: Tensor) -> Tensor:
        """Float32 logits [B, classes] of pixels in [-1, 1] [B, 3, H, W], resized bilinearly with antialiasing."""
        with torch.autocast(pixels.device.type, enabled=False):
            images = (pixels.float() + 1.0) / 2.0
            images = F.interpolate(images, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False, antialias=True)
            return self.network((images - self.mean) / self.std)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance between image batches.

        Args:
            a: pixels in [-1, 1], [B, 3, H, W].
            b: the same shape.

        Returns:
            float32 scalar, the mean over images and classes.
        """
        return F.mse_loss(self.logits(a), self.logits(b))


def load_convnext(weights: str | Path | None = None) -> ClassifierDistance:
    """Torchvision's ConvNeXt-S with its ImageNet-1k weights from a local file; nothing is ever downloaded.

    Args:
        weights: the file, or a folder with ``convnext_small-0c510722.pth``; None = the folders of VGEN_WEIGHTS and
            torch's own cache.

    Raises:
        UserError: if the file is missing (naming every path tried) or damaged.
    """
    from torchvision.models import convnext_small

    given = [Path(weights)] if weights is not None and Path(weights).is_file() else []
    candidates = given + [folder / name for folder in search_folders(weights) for name in CONVNEXT_FILES]
    path = find_weights(candidates, CONVNEXT_FILES, "convnext")
    network = convnext_small()
    try:
        network.load_state_dict(read_weight_file(path, "convnext"))
    except RuntimeError as error:
        raise UserError(
            f"perceptual=convnext: {path} does not fit torchvision's convnext_small "
            f"({' '.join(str(error).split())[:300]})"
        ) from error
    return ClassifierDistance(network)
