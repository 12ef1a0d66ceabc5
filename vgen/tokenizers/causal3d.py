"""Clips to a (T, H, W) grid of tokens by causal 3D convolutions, jointly for pictures and video.

After MAGVIT-v2 (arXiv 2310.05737), OmniTokenizer (arXiv 2406.09399) and Cosmos (arXiv 2501.03575): the first frame is
encoded alone, then groups of frames; a picture is a clip of one frame.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.tokenizers.base import Tokenizer, TokenizerOutput
from vgen.tokenizers.causal3d_net import CausalDecoder, CausalEncoder, Memory
from vgen.tokenizers.fsq import FSQ
from vgen.tokenizers.quantize import Quantized, VectorQuantizer

TIME_PADDINGS = ("first", "zeros")


class Causal3D(Tokenizer):
    """Causal convolutional encoder and decoder around a vector quantizer or finite scalar quantization.

    Clips of 1 + k * time_stride frames and any height and width divisible by the space stride are accepted;
    `num_frames` and `image_size` only fix the usual grid (1 + (num_frames - 1) / time_stride, side, side).

    Args:
        image_size: side in pixels of the frames.
        num_frames: frames of a clip.
        patch_size: side of the squares of pixels folded into channels first, to make the networks cheaper; 1 = none.
        base_channels: channels at the resolution of the patches.
        multipliers: channel multiplier of every resolution, highest resolution first.
        time_strides: 1 or 2 between each two resolutions.
        space_strides: likewise.
        num_res_blocks: residual blocks per resolution of the encoder (the decoder has one more).
        z_channels: channels between the convolutional networks and the quantizer's 1x1x1 convolutions.
        quantizer: turns latents into codes.
        norm_groups: groups of the group normalisation (the greatest common divisor with the channels is used).
        time_padding: what stands before the first frame: ``first`` (copies of it) or ``zeros``.
        gradient_checkpointing: recompute layers in the backward pass instead of storing their activations.

    Raises:
        UserError: if the options contradict each other.
    """

    def __init__(
        self,
        *,
        image_size: int,
        num_frames: int,
        patch_size: int,
        base_channels: int,
        multipliers: Sequence[int],
        time_strides: Sequence[int],
        space_strides: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        quantizer: VectorQuantizer | FSQ,
        norm_groups: int,
        time_padding: str,
        gradient_checkpointing: bool,
    ):
        _check(multipliers, time_strides, space_strides, time_padding)
        for key, size in (
            ("patch_size", patch_size),
            ("base_channels", base_channels),
            ("num_res_blocks", num_res_blocks),
            ("z_channels", z_channels),
            ("norm_groups", norm_groups),
        ):
            if size < 1:
                raise UserError(f"tokenizer.{key}={size} must be at least 1")
        time_stride, space_stride = prod(time_strides), patch_size * prod(space_strides)
        if image_size < 1 or image_size % space_stride:
            raise UserError(f"tokenizer.image_size={image_size} must be a multiple of the stride {space_stride}")
        super().__init__(
            image_size=image_size,
            grid=(token_frames(num_frames, time_stride), image_size // space_stride, image_size // space_stride),
            codebook_size=quantizer.codebook_size,
        )
        self.num_frames: int = num_frames
        self.time_stride, self.space_stride = time_stride, space_stride
        network: dict[str, Any] = {
            "patch_size": patch_size,
            "base_channels": base_channels,
            "multipliers": multipliers,
            "time_strides": time_strides,
            "space_strides": space_strides,
            "num_res_blocks": num_res_blocks,
            "z_channels": z_channels,
            "groups": norm_groups,
            "time_padding": time_padding,
            "gradient_checkpointing": gradient_checkpointing,
        }
        self.encoder = CausalEncoder(**network)
        self.decoder = CausalDecoder(**network)
        self.quantize = quantizer
        codebook_dim = quantizer.codebook.shape[1]
        self.quant_conv = nn.Conv3d(z_channels, codebook_dim, 1)
        self.post_quant_conv = nn.Conv3d(codebook_dim, z_channels, 1)
        self._compiled: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None

    @property
    def codebook(self) -> Tensor:
        """Codes as the decoder sees them, float32 [K, C]."""
        return self.quantize.codebook

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's last convolution."""
        return self.decoder.get_parameter("conv_out.weight")

    def compile_parts(self) -> None:
        """Compile the convolutional networks in place for training, all but the last layer; names stay."""
        self._compiled = (torch.compile(self.encoder.forward), torch.compile(self.decoder.features))

    def _networks(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """Only training uses the compiled networks: other modes and shapes would compile again."""
        trains = self.training and torch.is_grad_enabled()
        return self._compiled if self._compiled and trains else (self.encoder, self.decoder.features)

    def latents(self, pixels: Tensor, memory: Memory | None = None) -> Tensor:
        """Latents before quantization.

        Args:
            pixels: clips [B, 3, T, H, W], or pictures [B, 3, H, W], which are clips of one frame, in [-1, 1].
            memory: of the encoder, when `pixels` is a piece of a longer clip; see :class:`Memory`.

        Returns:
            [B, codebook_dim, t, h, w].

        Raises:
            UserError: for another number of channels, or sizes that do not divide.
        """
        if pixels.dim() == 4:
            pixels = pixels.unsqueeze(2)
        if pixels.dim() != 5 or pixels.shape[1] != 3:
            raise UserError(f"the tokenizer takes [B, 3, T, H, W] or [B, 3, H, W], got shape {list(pixels.shape)}")
        frames, height, width = pixels.shape[2:]
        if memory is None or memory.recall(self) is None:
            token_frames(frames, self.time_stride)
        elif frames % self.time_stride:
            raise UserError(f"later pieces of a clip need a multiple of {self.time_stride} frames, got {frames}")
        if height % self.space_stride or width % self.space_stride or not height * width:
            raise UserError(f"frames of {height} x {width} pixels do not divide by the stride {self.space_stride}")
        if memory is not None:
            memory.keep(self, pixels[:, :, :0])
        encode = self._networks()[0]
        pixels = pixels.to(self.last_layer.dtype)
        return self.quant_conv(encode(pixels) if memory is None else encode(pixels, memory))

    def decode_latents(self, latents: Tensor, memory: Memory | None = None) -> Tensor:
        """Quantized latents [B, codebook_dim, t, h, w] to float32 pixels [B, 3, T, H, W], not clamped."""
        decode = self._networks()[1]
        latents = self.post_quant_conv(latents.to(self.last_layer.dtype))
        features = decode(latents) if memory is None else decode(latents, memory)
        return self.decoder.pixels(features, memory).float()

    def encode(self, pixels: Tensor, memory: Memory | None = None) -> Tensor:
        """Clips [B, 3, T, H, W] or pictures [B, 3, H, W] in [-1, 1] to ids int64 [B, N] in t, h, w order."""
        latents = self.latents(pixels, memory)
        if isinstance(self.quantize, FSQ):
            return self.quantize(latents.movedim(1, -1))[1].flatten(1)
        with torch.autocast(latents.device.type, enabled=False):
            ids = self.quantize.nearest(self.quantize.rows(latents.flatten(2, 3)), self.codebook)
        return ids.view(len(pixels), -1)

    def decode(self, ids: Tensor, grid: Sequence[int] | None = None, memory: Memory | None = None) -> Tensor:
        """Ids to pixels.

        Args:
            ids: int64 [B, N] in t, h, w order.
            grid: (t, h, w) when the clip is not of the usual size; (1, h, w) for pictures.
            memory: of the decoder, when `ids` belong to a piece of a longer clip; see :class:`Memory`.

        Returns:
            float32 [B, 3, T, h * space_stride, w * space_stride], not clamped; T = 1 + (t - 1) * time_stride, or
            t * time_stride in a later piece.

        Raises:
            UserError: if the number of ids does not fit the grid.
        """
        shape = tuple(self.grid if grid is None else grid)
        if len(shape) != 3 or ids.dim() != 2 or ids.shape[1] != prod(shape):
            raise UserError(f"ids of shape {list(ids.shape)} do not fill a token grid of {shape}; pass grid=")
        codes = self.quantize.codes(ids) if isinstance(self.quantize, FSQ) else self.quantize.lookup(ids)
        return self.decode_latents(codes.transpose(1, 2).unflatten(2, shape), memory)

    def _quantized(self, latents: Tensor) -> Quantized:
        """Quantize [B, C, t, h, w]."""
        if isinstance(self.quantize, FSQ):
            codes, ids = self.quantize(latents.movedim(1, -1))
            return Quantized(codes.movedim(-1, 1), ids.flatten(1), {})
        # The vector quantizer knows two axes.
        quantized = self.quantize(latents.flatten(2, 3))
        return Quantized(quantized.latent.unflatten(2, latents.shape[2:4]), quantized.ids, quantized.losses)

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        """Reconstruct clips [B, 3, T, H, W], or pictures [B, 3, H, W], with gradients through the quantizer."""
        quantized = self._quantized(self.latents(pixels))
        reconstruction = self.decode_latents(quantized.latent)
        if pixels.dim() == 4:
            reconstruction = reconstruction.squeeze(2)
        return TokenizerOutput(reconstruction, quantized.ids, quantized.losses)

    def statistics(self, ids: Tensor) -> dict[str, Tensor]:
        """Perplexity of `ids` and, with learned codes, the share of them used in the recent training tokens."""
        usage = {} if isinstance(self.quantize, FSQ) else {"codebook_usage": self.quantize.usage()}
        return super().statistics(ids) | usage


def token_frames(frames: int, stride: int) -> int:
    """Token frames of a clip: the first frame alone, then groups of ``stride``.

    Raises:
        UserError: naming the nearest valid lengths.
    """
    if frames < 1 or (frames - 1) % stride:
        below = 1 + max(0, frames - 1) // stride * stride
        raise UserError(
            f"a clip of {frames} frames is not 1 + a multiple of {stride}; the nearest lengths are {below} and "
            f"{below + stride}"
        )
    return 1 + (frames - 1) // stride


def _check(
    multipliers: Sequence[int], time_strides: Sequence[int], space_strides: Sequence[int], time_padding: str
) -> None:
    if not multipliers or min(multipliers) < 1:
        raise UserError("tokenizer.multipliers must list positive integers")
    for key, strides in (("time_strides", time_strides), ("space_strides", space_strides)):
        if len(strides) != len(multipliers) - 1 or any(stride not in (1, 2) for stride in strides):
            raise UserError(
                f"tokenizer.{key}={list(strides)} must hold a 1 or 2 between each two of the {len(multipliers)} "
                "multipliers"
            )
    if time_padding not in TIME_PADDINGS:
        raise UserError(f"tokenizer.time_padding={time_padding} is unknown; choose one of {', '.join(TIME_PADDINGS)}")
