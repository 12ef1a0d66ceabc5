"""MaskGIT's convolutional VQGAN (arXiv 2202.04200) as ported by TiTok: teacher, pixel decoder, RAR's tokenizer.

Module names are those of ``maskgit-vqgan-imagenet-f16-256.bin``. The networks work in [0, 1]; there is no attention.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.tokenizers.base import check_pixels
from vgen.tokenizers.grid_vq import GridVQ
from vgen.tokenizers.norm_swish import group_norm
from vgen.tokenizers.proxy import PixelDecoder
from vgen.tokenizers.quantize import VectorQuantizer


class ResBlock(nn.Module):
    """Two 3x3 convolutions without bias.

    Where the width changes, the 1x1 shortcut is applied to the branch and the block's input is dropped, as in the
    published JAX weights.
    """

    def __init__(self, in_channels: int, out_channels: int, *, groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = None
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, in, H, W] to [B, out, H, W]."""
        branch = self.conv1(self.norm1.swish(x))
        branch = self.conv2(self.norm2.swish(branch))
        return branch + (x if self.nin_shortcut is None else self.nin_shortcut(branch))


class _Level(nn.Module):
    """Residual blocks of one resolution and, in the decoder, the convolution after doubling it."""

    def __init__(self, in_channels: int, channels: int, *, blocks: int, groups: int, upsample: bool):
        super().__init__()
        widths = [in_channels] + [channels] * blocks
        self.block = nn.ModuleList(ResBlock(a, b, groups=groups) for a, b in pairwise(widths))
        self.upsample_conv = nn.Conv2d(channels, channels, 3, padding=1) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.upsample_conv is not None:
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Encoder(nn.Module):
    """Images in [0, 1] [B, 3, H, W] to [B, z_channels, H/s, W/s], s = 2 ** (len(multipliers) - 1).

    Args:
        base_channels: channels at full resolution.
        multipliers: of the channels per resolution, highest resolution first.
        num_res_blocks: residual blocks per resolution and in the middle.
        z_channels: channels of the result.
        norm_groups: groups of the group normalisation.
    """

    def __init__(
        self,
        *,
        base_channels: int,
        multipliers: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        norm_groups: int = 32,
    ):
        super().__init__()
        widths = [base_channels] + [base_channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(3, base_channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            _Level(a, b, blocks=num_res_blocks, groups=norm_groups, upsample=False) for a, b in pairwise(widths)
        )
        self.mid = nn.ModuleList(ResBlock(widths[-1], widths[-1], groups=norm_groups) for _ in range(num_res_blocks))
        self.norm_out = group_norm(widths[-1], norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to features."""
        x = self.conv_in(x)
        for index, level in enumerate(self.down):
            x = level(x)
            if index < len(self.down) - 1:
                x = F.avg_pool2d(x, 2)
        for block in self.mid:
            x = block(x)
        return self.conv_out(self.norm_out.swish(x))


class MaskGITDecoder(PixelDecoder):
    """Codes [B, z_channels, h, w] to images of about [0, 1] [B, 3, h*s, w*s]; also the pixel decoder of TiTok.

    Args:
        base_channels: channels at full resolution.
        multipliers: of the channels per resolution, highest resolution first.
        num_res_blocks: residual blocks per resolution and in the middle.
        z_channels: channels of a code.
        norm_groups: groups of the group normalisation.
    """

    def __init__(
        self,
        *,
        base_channels: int,
        multipliers: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        norm_groups: int = 32,
    ):
        super().__init__()
        self.code_channels = z_channels
        self.stride = 2 ** (len(multipliers) - 1)
        widths = [base_channels * m for m in multipliers]
        widths.append(widths[-1])
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(ResBlock(widths[-1], widths[-1], groups=norm_groups) for _ in range(num_res_blocks))
        # Listed by level although the lowest resolution, which is the last, runs first.
        self.up = nn.ModuleList(
            _Level(widths[i + 1], widths[i], blocks=num_res_blocks, groups=norm_groups, upsample=i > 0)
            for i in range(len(multipliers))
        )
        self.norm_out = group_norm(widths[0], norm_groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last convolution."""
        return self.get_parameter("conv_out.weight")

    def features(self, codes: Tensor) -> Tensor:
        """What the last convolution sees."""
        x = self.conv_in(codes)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return self.norm_out.swish(x)

    def finish(self, features: Tensor) -> Tensor:
        """The last convolution."""
        return self.conv_out(features)


class MaskGITVQGAN(GridVQ):
    """The convolutional tokenizer itself: ids in raster order on a grid of image_size / stride.

    Images of any height and width divisible by the stride are accepted; `image_size` only fixes the usual token grid.

    Args:
        image_size: side in pixels of the images of this tokenizer.
        base_channels: channels at full resolution.
        multipliers: of the channels per resolution, highest resolution first; the stride is 2 ** (entries - 1).
        num_res_blocks: residual blocks per resolution and in the middle.
        z_channels: length of a code.
        codebook_size: number of codes.
        commitment_weight: weight of the commitment loss.
        usage_window: tokens over which codebook usage is counted.
        norm_groups: groups of the group normalisation.

    Raises:
        UserError: if the sizes contradict each other.
    """

    encoder: Encoder
    decoder: MaskGITDecoder

    def __init__(
        self,
        *,
        image_size: int,
        base_channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        codebook_size: int = 1024,
        commitment_weight: float = 0.25,
        usage_window: int = 65536,
        norm_groups: int = 32,
    ):
        if not multipliers or min(base_channels, num_res_blocks, z_channels, norm_groups, *multipliers) < 1:
            raise UserError("tokenizer: channels, blocks, groups and multipliers must be at least 1")
        stride = 2 ** (len(multipliers) - 1)
        if image_size < 1 or image_size % stride:
            raise UserError(f"tokenizer.image_size={image_size} must be a multiple of the stride {stride}")
        sizes: dict[str, Any] = {
            "base_channels": base_channels,
            "multipliers": list(multipliers),
            "num_res_blocks": num_res_blocks,
            "z_channels": z_channels,
            "norm_groups": norm_groups,
        }
        super().__init__(
            image_size=image_size,
            stride=stride,
            encoder=Encoder(**sizes),
            decoder=MaskGITDecoder(**sizes),
            quantize=VectorQuantizer(
                codebook_size=codebook_size,
                codebook_dim=z_channels,
                l2_normalize=False,
                commitment_weight=commitment_weight,
                usage_window=usage_window,
            ),
        )
        self._sizes = sizes

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's last convolution."""
        return self.decoder.last_layer

    def pixel_decoder_config(self) -> dict[str, Any]:
        """Constructor arguments of the decoder."""
        return {"_target_": "vgen.tokenizers.maskgit_vqgan.MaskGITDecoder", **self._sizes}

    def pixel_decoder_state(self) -> dict[str, Tensor]:
        """Weights of the decoder."""
        return self.decoder.state_dict()

    def hold_decoder(self, dtype: torch.dtype) -> bool:
        """Hold the decoder in a dtype."""
        self.decoder.to(dtype)
        return True

    def latents(self, pixels: Tensor) -> Tensor:
        """Latents before quantization; see :meth:`GridVQ.latents`, [B, z_channels, h, w]."""
        check_pixels(pixels, self.stride)
        encode, _ = self._networks()
        return encode((pixels.to(self.encoder.conv_in.weight.dtype) + 1.0) / 2.0)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Codes [B, z_channels, h, w] to float32 pixels [B, 3, H, W] in about [-1, 1]."""
        _, features = self._networks()
        return self.decoder.finish(features(latents.to(self.last_layer.dtype))).float() * 2.0 - 1.0
