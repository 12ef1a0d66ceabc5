"""Group normalisation and SiLU of convolutional decoders, on channels-last maps in kernels that read them as they lie.

On CUDA, PyTorch's normalisation copies channels-last maps to the other layout, the next convolution copies back, and
SiLU and the biases of convolutions are passes over memory of their own. The kernels are for decoding without gradients;
``torch.compile`` makes its own.
"""

import math
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgen.layers.availability import why_not
from vgen.layers.tiles import power_of_two

_NUMBERS = 8192  # per tile
_MOST_CHANNELS, _MOST_CHUNKS, _LEAST_SPAN, _TILES = 1024, 64, 256, 4


class GroupNorm(nn.GroupNorm):
    """As of PyTorch, with SiLU behind it where asked.

    Attributes:
        fused: use the kernels for what they can take; they round differently.
    """

    fused = False

    def takes(self, x: Tensor) -> bool:
        """Whether the kernels are wanted here and can take a map [B, C, H, W]."""
        return (
            self.fused
            and not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and x.dim() == 4
            and x.numel() > 0
            and x.is_contiguous(memory_format=torch.channels_last)
            and x.dtype == self.weight.dtype
            and power_of_two(self.num_channels) == self.num_channels <= _MOST_CHANNELS
            and power_of_two(self.num_groups) == self.num_groups
            and why_not(x.device) is None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, ...]."""
        return _normalised(self, x, None, swish=False) if self.takes(x) else super().forward(x)

    def swish(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """SiLU of normalised x [B, C, ...]; a bias [C] is added to x first."""
        if self.takes(x):
            return _normalised(self, x, bias, swish=True)
        if bias is not None:
            x = x + bias.view(-1, *([1] * (x.dim() - 2)))
        return F.silu(super().forward(x))


def group_norm(channels: int, groups: int) -> GroupNorm:
    """GroupNorm with at most `groups` groups, fewer where the channels do not divide."""
    return GroupNorm(math.gcd(channels, groups), channels, eps=1e-6)


def convolve_plain(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution without its bias, which whatever reads the result adds."""
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding)


def add_biased(branch: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """The sum of two channels-last maps [B, C, H, W] and a bias [C], in place of the first; where kernels are taken."""
    branch, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (branch, x))
    count = branch.numel()
    with torch.cuda.device_of(branch):
        _kernels().add_biased[(-(-count // _NUMBERS),)](
            branch, x, bias, count, CHANNELS=branch.shape[1], BLOCK=_NUMBERS, num_warps=8
        )
    return branch


def _normalised(norm: GroupNorm, x: Tensor, bias: Tensor | None, *, swish: bool) -> Tensor:
    kernels = _kernels()
    batch, channels, positions = len(x), x.shape[1], x.shape[2] * x.shape[3]
    rows = _NUMBERS // channels
    steps = -(-max(_LEAST_SPAN, -(-positions // _MOST_CHUNKS)) // rows)
    chunks = -(-positions // (rows * steps))
    sums = torch.empty(batch, chunks, 2, norm.num_groups, dtype=torch.float32, device=x.device)
    scales = torch.empty(batch, 2, channels, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    offset, same = norm.bias if bias is None else bias, {"CHANNELS": channels, "num_warps": 8}
    sizes = {"GROUPS": norm.num_groups, "BIASED": bias is not None, **same}
    # Triton launches on the current device.
    with torch.cuda.device_of(x):
        kernels.sum_groups[(batch, chunks)](x, offset, sums, positions, ROWS=rows, STEPS=steps, **sizes)
        kernels.make_scales[(batch,)](
            sums, norm.weight, norm.bias, offset, scales, chunks, positions, norm.eps, CHUNKS=_MOST_CHUNKS, **sizes
        )
        kernels.apply_scales[(batch, -(-positions // (rows * _TILES)))](
            x, scales, out, positions, ROWS=rows, TILES=_TILES, SWISH=swish, **same
        )
    return out


@cache
def _kernels() -> ModuleType:
    """Without triton their file cannot be imported."""
    from vgen.tokenizers import norm_swish_kernels

    return norm_swish_kernels
