"""Convolutional encoder and decoder of the VQ-GAN family (Esser et al., 2021), with the published module names."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgen.tokenizers.norm_swish import add_biased, convolve_plain, group_norm


class ResBlock(nn.Module):
    """Two 3x3 convolutions with pre-normalisation and a skip, [B, in, H, W] -> [B, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int = 32, dropout: float = 0.0):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.has_shortcut = in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, in, H, W] to [B, out, H, W]."""
        if self.norm1.takes(x):
            return self._fused(x)
        branch = self.conv1(self.norm1.swish(x))
        branch = self.conv2(self.dropout(self.norm2.swish(branch)))
        return branch + (self.nin_shortcut(x) if self.has_shortcut else x)

    def _fused(self, x: Tensor) -> Tensor:
        """The same with the biases added by the kernels that read what the convolutions wrote."""
        branch = convolve_plain(self.conv1, self.norm1.swish(x))
        branch = convolve_plain(self.conv2, self.dropout(self.norm2.swish(branch, self.conv1.bias)))
        bias: Tensor = self.get_parameter("conv2.bias")
        if self.has_shortcut:
            x, bias = convolve_plain(self.nin_shortcut, x), bias + self.get_parameter("nin_shortcut.bias")
        return add_biased(branch, x, bias)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, [B, C, H, W] -> same."""

    def __init__(self, channels: int, *, groups: int = 32):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to the same shape."""
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the resolution; the padding is on the right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, C, H / 2, W / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution by repetition, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Stack(nn.Module):
    """Modules run one after the other, optionally recomputed in the backward pass to save memory."""

    gradient_checkpointing: bool

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(module, x, use_reentrant=False)
        return module(x)


class _Level(_Stack):
    """Residual blocks of one resolution, each followed by attention where asked, then a change of resolution."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        blocks: int,
        attention: bool,
        groups: int,
        dropout: float,
        gradient_checkpointing: bool,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        widths = [in_channels] + [channels] * blocks
        self.res = nn.ModuleList(ResBlock(a, b, groups=groups, dropout=dropout) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(channels, groups=groups) for _ in range(blocks if attention else 0))
        self.downsample = Downsample(channels) if downsample else None
        self.upsample = Upsample(channels) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x = self._run(block, x)
            if self.attn:
                x = self._run(self.attn[index], x)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x = resample(x)
        return x


def _middle(channels: int, groups: int, dropout: float) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResBlock(channels, channels, groups=groups, dropout=dropout),
            AttnBlock(channels, groups=groups),
            ResBlock(channels, channels, groups=groups, dropout=dropout),
        ]
    )


class Encoder(_Stack):
    """Pixels [B, 3, H, W] to features [B, z_channels, H/s, W/s], s = 2 ** (len(multipliers) - 1)."""

    def __init__(
        self,
        *,
        base_channels: int,
        multipliers: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        groups: int,
        dropout: float,
        gradient_checkpointing: bool,
    ):
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.conv_in = nn.Conv2d(3, base_channels, 3, padding=1)
        widths = [base_channels] + [base_channels * m for m in multipliers]
        last = len(multipliers) - 1
        self.conv_blocks = nn.ModuleList(
            _Level(
                widths[i],
                widths[i + 1],
                blocks=num_res_blocks,
                attention=i == last,
                groups=groups,
                dropout=dropout,
                gradient_checkpointing=gradient_checkpointing,
                downsample=i < last,
            )
            for i in range(len(multipliers))
        )
        self.mid = _middle(widths[-1], groups, dropout)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels to features."""
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        for block in self.mid:
            x = self._run(block, x)
        return self.conv_out(self.norm_out.swish(x))


class Decoder(_Stack):
    """Features [B, z_channels, h, w] to pixels [B, 3, h*s, w*s]; the first level is the lowest resolution."""

    def __init__(
        self,
        *,
        base_channels: int,
        multipliers: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        groups: int,
        dropout: float,
        gradient_checkpointing: bool,
    ):
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        widths = [base_channels * m for m in reversed(multipliers)]
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], groups, dropout)
        self.conv_blocks = nn.ModuleList(
            _Level(
                widths[max(i - 1, 0)],
                widths[i],
                blocks=num_res_blocks + 1,
                attention=i == 0,
                groups=groups,
                dropout=dropout,
                gradient_checkpointing=gradient_checkpointing,
                upsample=i < len(widths) - 1,
            )
            for i in range(len(widths))
        )
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        """What the last convolution sees, [B, base_channels, h*s, w*s]."""
        x = self.conv_in(x)
        for block in self.mid:
            x = self._run(block, x)
        for level in self.conv_blocks:
            x = level(x)
        return self.norm_out.swish(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map features to pixels."""
        return self.conv_out(self.features(x))
