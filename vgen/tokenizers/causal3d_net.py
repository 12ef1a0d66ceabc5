"""Convolutions over time that never look ahead, and the encoder and decoder built from them.

The family of MAGVIT-v2 (arXiv 2310.05737): time is padded on the past side only, the first frame stays a group of its
own, so that a picture is a clip of one frame. Everything else acts within a frame, normalisation included; a norm over
time would let a future frame change a past latent.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgen.pixels import frames_of
from vgen.tokenizers.convnet import AttnBlock
from vgen.tokenizers.norm_swish import group_norm


class Memory:
    """What the convolutions need of earlier frames, so that a long clip can be fed piece by piece.

    The first piece has 1 + k groups of frames, all later ones whole groups.
    """

    def __init__(self) -> None:
        self._frames: dict[nn.Module, Tensor] = {}

    def recall(self, module: nn.Module) -> Tensor | None:
        """Last input frames of a module, None at the start of a clip."""
        return self._frames.get(module)

    def keep(self, module: nn.Module, frames: Tensor) -> None:
        """Replace them."""
        self._frames[module] = frames


class CausalConv3d(nn.Conv3d):
    """3D convolution whose output at time t sees inputs up to t; "same" padding in space.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        time_kernel: extent over time.
        space_kernel: extent in space.
        time_stride: 1, or 2 to keep frames 0, 2, 4, ...
        space_stride: 1, or 2 with padding on the right and bottom only.
        time_padding: ``first`` repeats the first frame into the past, ``zeros`` does what it says.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_kernel: int = 3,
        space_kernel: int = 3,
        time_stride: int = 1,
        space_stride: int = 1,
        time_padding: str = "first",
    ):
        super().__init__(
            in_channels,
            out_channels,
            (time_kernel, space_kernel, space_kernel),
            stride=(time_stride, space_stride, space_stride),
        )
        self.time_kernel, self.time_stride, self.time_padding = time_kernel, time_stride, time_padding
        both = space_kernel - space_stride
        self.sides = (both // 2, both - both // 2) * 2

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Map x [B, in, T, H, W] to [B, out, ceil(T / time_stride), H / space_stride, W / space_stride]."""
        past = None if memory is None else memory.recall(self)
        if past is None:
            first = x[:, :, :1].expand(-1, -1, self.time_kernel - 1, -1, -1)
            past = first if self.time_padding == "first" else torch.zeros_like(first)
        x = torch.cat([past, x], dim=2)
        if memory is not None:
            memory.keep(self, x[:, :, x.shape[2] - (self.time_kernel - self.time_stride) :])
        return super().forward(F.pad(x, self.sides))


class FrameNorm(nn.Module):
    """Group normalisation of every frame by itself."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, T, H, W]."""
        return self.norm(frames_of(x)).unflatten(0, (len(x), -1)).transpose(1, 2)


class FrameAttention(nn.Module):
    """Single-head self-attention among the positions of one frame."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.attn = AttnBlock(channels, groups=groups)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Map x [B, C, T, H, W] to the same shape; earlier frames are not needed."""
        return self.attn(frames_of(x)).unflatten(0, (len(x), -1)).transpose(1, 2)


class ResBlock3d(nn.Module):
    """Two causal convolutions with pre-normalisation and a skip."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, time_padding: str):
        super().__init__()
        self.norm1 = FrameNorm(in_channels, groups)
        self.conv1 = CausalConv3d(in_channels, out_channels, time_padding=time_padding)
        self.norm2 = FrameNorm(out_channels, groups)
        self.conv2 = CausalConv3d(out_channels, out_channels, time_padding=time_padding)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Map x [B, in, T, H, W] to [B, out, T, H, W]."""
        branch = self.conv1(F.silu(self.norm1(x)), memory)
        branch = self.conv2(F.silu(self.norm2(branch)), memory)
        return self.shortcut(x) + branch


class Upsample3d(nn.Module):
    """Double space by repetition and time by channels; frame 0 stays alone, its twin is dropped."""

    def __init__(self, channels: int, *, time: int, space: int, time_padding: str):
        super().__init__()
        self.time, self.space = time, space
        self.conv = CausalConv3d(channels, channels * time, time_padding=time_padding)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Map x [B, C, T, H, W] to [B, C, 1 + (T - 1) * time, H * space, W * space]."""
        first = memory is None or memory.recall(self) is None
        if self.space > 1:
            x = x.repeat_interleave(self.space, 3).repeat_interleave(self.space, 4)
        x = self.conv(x, memory)
        if memory is not None:
            memory.keep(self, x[:, :, :0])
        if self.time > 1:
            x = x.unflatten(1, (-1, self.time)).transpose(2, 3).flatten(2, 3)
            x = x[:, :, self.time - 1 :] if first else x
        return x


class _Stack(nn.Module):
    """Modules run one after the other, optionally recomputed in the backward pass to save memory."""

    gradient_checkpointing: bool
    layers: nn.ModuleList

    def _run(self, x: Tensor, memory: Memory | None) -> Tensor:
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and memory is None
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x, memory)
        return x


class CausalEncoder(_Stack):
    """Pixels [B, 3, T, H, W] to features [B, z_channels, t, h, w].

    Args:
        patch_size: side of the squares of pixels folded into channels before the first layer.
        base_channels: channels at the resolution of the patches.
        multipliers: channel multiplier of every resolution, highest resolution first.
        time_strides: 1 or 2 between each two resolutions.
        space_strides: likewise.
        num_res_blocks: residual blocks per resolution.
        z_channels: channels out.
        groups: of the normalisation.
        time_padding: see :class:`CausalConv3d`.
        gradient_checkpointing: recompute layers in the backward pass.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        base_channels: int,
        multipliers: Sequence[int],
        time_strides: Sequence[int],
        space_strides: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        groups: int,
        time_padding: str,
        gradient_checkpointing: bool,
    ):
        super().__init__()
        self.patch_size, self.gradient_checkpointing = patch_size, gradient_checkpointing
        widths = [base_channels * m for m in (multipliers[0], *multipliers)]
        options: dict[str, Any] = {"groups": groups, "time_padding": time_padding}
        layers: list[nn.Module] = [CausalConv3d(3 * patch_size**2, widths[0], time_padding=time_padding)]
        for level, (before, width) in enumerate(pairwise(widths)):
            ends = [before] + [width] * num_res_blocks
            layers += [ResBlock3d(a, b, **options) for a, b in pairwise(ends)]
            if level < len(multipliers) - 1:
                strides = {"time_stride": time_strides[level], "space_stride": space_strides[level]}
                layers.append(CausalConv3d(width, width, time_padding=time_padding, **strides))
        layers += _middle(widths[-1], options)
        self.layers = nn.ModuleList(layers)
        self.norm_out = FrameNorm(widths[-1], groups)
        self.conv_out = CausalConv3d(widths[-1], z_channels, time_padding=time_padding)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Map pixels to features."""
        if self.patch_size > 1:
            x = F.pixel_unshuffle(x.transpose(1, 2), self.patch_size).transpose(1, 2)
        return self.conv_out(F.silu(self.norm_out(self._run(x, memory))), memory)


class CausalDecoder(_Stack):
    """Features [B, z_channels, t, h, w] to pixels [B, 3, T, H, W]; arguments as for the encoder, in its order."""

    def __init__(
        self,
        *,
        patch_size: int,
        base_channels: int,
        multipliers: Sequence[int],
        time_strides: Sequence[int],
        space_strides: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        groups: int,
        time_padding: str,
        gradient_checkpointing: bool,
    ):
        super().__init__()
        self.patch_size, self.gradient_checkpointing = patch_size, gradient_checkpointing
        widths = [base_channels * m for m in (*multipliers, multipliers[-1])][::-1]
        options: dict[str, Any] = {"groups": groups, "time_padding": time_padding}
        layers: list[nn.Module] = [CausalConv3d(z_channels, widths[0], time_padding=time_padding)]
        layers += _middle(widths[0], options)
        strides = list(zip(time_strides, space_strides, strict=True))[::-1]
        for level, (before, width) in enumerate(pairwise(widths)):
            ends = [before] + [width] * (num_res_blocks + 1)
            layers += [ResBlock3d(a, b, **options) for a, b in pairwise(ends)]
            if level < len(strides):
                time, space = strides[level]
                layers.append(Upsample3d(width, time=time, space=space, time_padding=time_padding))
        self.layers = nn.ModuleList(layers)
        self.norm_out = FrameNorm(widths[-1], groups)
        self.conv_out = CausalConv3d(widths[-1], 3 * patch_size**2, time_padding=time_padding)

    def features(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """What the last convolution sees, [B, base_channels, T, H / patch_size, W / patch_size]."""
        return F.silu(self.norm_out(self._run(x, memory)))

    def pixels(self, features: Tensor, memory: Memory | None = None) -> Tensor:
        """The last convolution, [B, 3, T, H, W]."""
        x = self.conv_out(features, memory)
        return F.pixel_shuffle(x.transpose(1, 2), self.patch_size).transpose(1, 2) if self.patch_size > 1 else x

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Map features to pixels."""
        return self.pixels(self.features(x, memory), memory)


def _middle(channels: int, options: dict) -> list[nn.Module]:
    return [
        ResBlock3d(channels, channels, **options),
        FrameAttention(channels, options["groups"]),
        ResBlock3d(channels, channels, **options),
    ]
