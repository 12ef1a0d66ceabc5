"""I3D: Inception-v1 inflated to three dimensions (Carreira and Zisserman 2017, arXiv 1705.07750), Kinetics-400.

The feature network of the Frechet video distance. Module names are those of the published state dict
(``i3d_pretrained_400.pt`` of VideoGPT, TATS, OmniTokenizer), which therefore loads without conversion.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgen.errors import UserError

CLASSES = 400
SIDE = 224
MIN_FRAMES = 9

# Output widths of a block's branches: 1x1, 3x3 (reduction, result), second 3x3 (reduction, result), pooled.
_BLOCKS = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
# Pooling before a block: kernel and stride over (time, height, width).
_POOLS = {"3b": ((1, 3, 3), (1, 2, 2)), "4b": ((3, 3, 3), (2, 2, 2)), "5b": ((2, 2, 2), (2, 2, 2))}


def _same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Pad with zeros as TensorFlow's "same" does; the amount depends on the size of the input."""
    padding: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max(k - (s if size % s == 0 else size % s), 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding)


def _max_pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return F.max_pool3d(_same(x, kernel, stride), kernel, stride)


class _Unit(nn.Module):
    """Convolution, batch normalisation, ReLU; without normalisation it has a bias and no ReLU."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, *, norm: bool = True):
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(cin, cout, kernel, stride, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm3d(cout, eps=1e-5)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(_same(x, self.kernel, self.stride))
        return F.relu(self.bn(x)) if self.norm else x


class _Mixed(nn.Module):
    """Inception block of four branches."""

    def __init__(self, cin: int, widths: tuple[int, ...]):
        super().__init__()
        self.b0 = _Unit(cin, widths[0], 1)
        self.b1a = _Unit(cin, widths[1], 1)
        self.b1b = _Unit(widths[1], widths[2], 3)
        self.b2a = _Unit(cin, widths[3], 1)
        self.b2b = _Unit(widths[3], widths[4], 3)
        self.b3b = _Unit(cin, widths[5], 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = _max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class I3D(nn.Module):
    """I3D with its published names; frozen, in evaluation mode. A new instance has random weights."""

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = _Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        width = 192
        for name, widths in _BLOCKS.items():
            self.add_module(f"Mixed_{name}", _Mixed(width, widths))
            width = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = _Unit(width, CLASSES, 1, norm=False)
        self.requires_grad_(False)
        self.eval()

    def pooled(self, clips: Tensor) -> Tensor:
        """Features before the classifier, [B, 1024, T', 1, 1]; see :meth:`forward`."""
        if clips.shape[2] < MIN_FRAMES or tuple(clips.shape[3:]) != (SIDE, SIDE):
            raise UserError(
                f"I3D needs clips of at least {MIN_FRAMES} frames of {SIDE}x{SIDE}, not {clips.shape[2]} frames of "
                f"{clips.shape[4]}x{clips.shape[3]}"
            )
        x = _max_pool(self.Conv3d_1a_7x7(clips), (1, 3, 3), (1, 2, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        for name in _BLOCKS:
            if name in _POOLS:
                x = _max_pool(x, *_POOLS[name])
            x = self.get_submodule(f"Mixed_{name}")(x)
        return F.avg_pool3d(x, (2, 7, 7), 1)

    def forward(self, clips: Tensor) -> Tensor:
        """Kinetics logits averaged over time.

        Args:
            clips: float [B, 3, T, 224, 224] in [-1, 1], T at least 9.

        Returns:
            [B, 400], the features of the Frechet video distance.

        Raises:
            UserError: for clips of another size: the network would return a map, not features.
        """
        return self.logits(self.pooled(clips)).mean(2).flatten(1)


def load_i3d(state: Mapping[str, Tensor]) -> I3D:
    """I3D with the published state dict; ``num_batches_tracked`` may be missing.

    Raises:
        UserError: if names or shapes differ.
    """
    with torch.device("meta"):
        network = I3D()
    own = network.state_dict()
    complete = {k: torch.zeros((), dtype=torch.int64) for k in own if k.endswith("num_batches_tracked")} | dict(state)
    try:
        network.load_state_dict(complete, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"the weights are not those of I3D on Kinetics-400 ({' '.join(str(error).split())[:200]})"
        ) from error
    return network.requires_grad_(False).eval()
