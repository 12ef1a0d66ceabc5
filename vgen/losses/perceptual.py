"""LPIPS v0.1 with the VGG16 trunk (Zhang et al., arXiv 1801.03924), the perceptual loss of VQ-GANs."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.losses.weight_files import find_weights, read_weight_file, search_folders

TRUNK_FILES = ("vgg16-397923af.pth",)
HEAD_FILES = ("vgg.pth", "weights-vgg16-lpips.pth")
# First and last + 1 torchvision layer of the five slices, which end after relu1_2, 2_2, 3_3, 4_3 and 5_3.
_SLICES = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))
_WIDTHS = (64, 128, 256, 512, 512)
_CONVS = (2, 2, 3, 3, 3)


class _Scaling(nn.Module):
    """From pixels in [-1, 1] to the statistics the trunk was trained with."""

    def __init__(self):
        super().__init__()
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class _Trunk(nn.Module):
    """The convolutions of VGG16, cut in five slices that keep torchvision's layer numbers as names."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        channels = 3
        for number, ((first, _), width, convs) in enumerate(zip(_SLICES, widths, _CONVS, strict=True), start=1):
            layers = nn.Sequential()
            index = first
            if number > 1:
                layers.add_module(str(index), nn.MaxPool2d(2))
                index += 1
            for _ in range(convs):
                layers.add_module(str(index), nn.Conv2d(channels, width, 3, padding=1))
                layers.add_module(str(index + 1), nn.ReLU())
                channels, index = width, index + 2
            self.add_module(f"slice{number}", layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for part in self.children():
            x = part(x)
            features.append(x)
        return features


class _Head(nn.Module):
    """Non-negative channel weights; the published layer 0 is a dropout that is never active here."""

    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LPIPS(nn.Module):
    """Learned perceptual distance; frozen, always in evaluation mode, with the published state dict names.

    A new instance has random weights: build it with :func:`load_lpips`, or load a state dict.

    Args:
        widths: channels of the five feature maps; the published weights fit the default only.
    """

    def __init__(self, widths: Sequence[int] = _WIDTHS):
        super().__init__()
        self.scaling_layer = _Scaling()
        self.net = _Trunk(widths)
        for index, width in enumerate(widths):
            self.add_module(f"lin{index}", _Head(width))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode whatever the surrounding training loop does."""
        return super().train(False)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """The five feature maps of pixels in [-1, 1] [B, 3, H, W], H and W at least 16."""
        return self.net(self.scaling_layer(pixels))

    def layers(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """Contribution of each feature map, five float32 [B]."""
        contributions = []
        for index, (x, y) in enumerate(zip(self.features(a), self.features(b), strict=True)):
            weight = self.get_parameter(f"lin{index}.model.1.weight")
            with torch.autocast(x.device.type, enabled=False):
                difference = (_unit(x.float()) - _unit(y.float())).square()
                contributions.append(F.conv2d(difference, weight.float()).mean((1, 2, 3)))
        return contributions

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance between image pairs.

        Args:
            a: pixels in [-1, 1], [B, 3, H, W].
            b: the same shape.

        Returns:
            float32 [B].
        """
        return torch.stack(self.layers(a, b)).sum(0)


def _unit(x: Tensor) -> Tensor:
    """Divide by the channel norm; written so that the gradient at an all-zero feature vector is zero, not NaN."""
    squares = x.square().sum(1, keepdim=True)
    zero = squares == 0
    norm = torch.where(zero, 1.0, squares).sqrt()
    return x / (torch.where(zero, 0.0, norm) + 1e-10)


def load_lpips(weights: str | Path | None = None) -> LPIPS:
    """Build LPIPS from local weight files; nothing is ever downloaded.

    The trunk (torchvision's VGG16) and the heads are searched, in this order, in `weights` (a folder, or the trunk's
    file), in the folders of the environment variable VGEN_WEIGHTS, in torch's own cache (TORCH_HOME/hub/checkpoints)
    and, for the heads only, in the copy that ships with torchmetrics.

    Raises:
        UserError: if a file is missing (naming every path tried) or damaged.
    """
    folders = search_folders(weights)
    trunk = [Path(weights)] if weights is not None and Path(weights).is_file() else []
    trunk += [folder / name for folder in folders for name in TRUNK_FILES]
    heads = [folder / name for folder in folders for name in HEAD_FILES] + _bundled_heads()
    lpips = LPIPS()
    state = dict(lpips.scaling_layer.state_dict(prefix="scaling_layer."))
    state |= trunk_state(read_weight_file(find_weights(trunk, TRUNK_FILES, "lpips"), "lpips"))
    learned = read_weight_file(find_weights(heads, HEAD_FILES, "lpips"), "lpips")
    state |= {key: value for key, value in learned.items() if key.startswith("lin")}
    try:
        lpips.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"perceptual=lpips: the weight files do not fit VGG16 and LPIPS v0.1 ({' '.join(str(error).split())[:300]})"
        ) from error
    return lpips


def trunk_state(vgg: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the convolutions of torchvision's VGG16, ``features.<i>.*``, to LPIPS's ``net.slice<k>.<i>.*``."""
    slices = {str(layer): k for k, (first, end) in enumerate(_SLICES, start=1) for layer in range(first, end)}
    state = {}
    for key, value in vgg.items():
        part, _, rest = key.partition(".")
        if part == "features":
            # A layer VGG16 does not have lands in slice 0, which does not exist, and is then reported as unexpected.
            state[f"net.slice{slices.get(rest.split('.')[0], 0)}.{rest}"] = value
    return state


def _bundled_heads() -> list[Path]:
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        return []
    return [Path(spec.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"]
