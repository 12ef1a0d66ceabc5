"""The convolutional VQ-GAN tokenizer of LlamaGen (arXiv 2406.06525, after Esser et al., 2021).

Module names are those of the published checkpoints.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.tokenizers.base import check_pixels
from vgen.tokenizers.convnet import Decoder, Encoder
from vgen.tokenizers.grid_vq import GridVQ
from vgen.tokenizers.quantize import VectorQuantizer


class VQGAN(GridVQ):
    """Convolutional encoder and decoder around a vector quantizer.

    Args:
        image_size: side in pixels of the images of this tokenizer; others are accepted, see :class:`GridVQ`.
        base_channels: channels at full resolution.
        encoder_multipliers: channel multiplier of every resolution, highest resolution first; each further entry halves
            the resolution, so the stride is 2 ** (entries - 1). Attention sits at the lowest resolution only.
        decoder_multipliers: the same for the decoder, also written highest resolution first.
        num_res_blocks: residual blocks per resolution of the encoder (the decoder has one more).
        z_channels: channels between the convolutional networks and the quantizer's 1x1 convolutions.
        codebook_size: number of codes.
        codebook_dim: length of a code.
        l2_normalize: use unit vectors as codes.
        commitment_weight: weight of the commitment loss.
        entropy_weight: weight of the entropy loss.
        entropy_temperature: temperature inside the entropy loss.
        dropout: dropout inside the residual blocks.
        usage_window: tokens over which codebook usage is counted.
        norm_groups: groups of the group normalisation (the greatest common divisor with the channels is used).
        gradient_checkpointing: recompute blocks in the backward pass instead of storing their activations.

    Raises:
        UserError: if the options contradict each other.
    """

    decoder: Decoder

    def __init__(
        self,
        *,
        image_size: int,
        encoder_multipliers: Sequence[int],
        decoder_multipliers: Sequence[int],
        base_channels: int = 128,
        num_res_blocks: int = 2,
        z_channels: int = 256,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        l2_normalize: bool = True,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        dropout: float = 0.0,
        usage_window: int = 65536,
        norm_groups: int = 32,
        gradient_checkpointing: bool = False,
    ):
        _check_sizes(
            base_channels=base_channels, num_res_blocks=num_res_blocks, z_channels=z_channels, norm_groups=norm_groups
        )
        stride = _check_multipliers(encoder_multipliers, decoder_multipliers)
        if image_size < 1 or image_size % stride:
            raise UserError(
                f"tokenizer.image_size={image_size} must be a multiple of the stride {stride} "
                f"that {len(encoder_multipliers)} encoder_multipliers give"
            )
        if not 0.0 <= dropout < 1.0:
            raise UserError(f"tokenizer.dropout={dropout} must be at least 0 and below 1")
        sizes: dict[str, Any] = {
            "base_channels": base_channels,
            "num_res_blocks": num_res_blocks,
            "z_channels": z_channels,
        }
        training: dict[str, Any] = {"dropout": dropout, "gradient_checkpointing": gradient_checkpointing}
        super().__init__(
            image_size=image_size,
            stride=stride,
            encoder=Encoder(**sizes, multipliers=encoder_multipliers, groups=norm_groups, **training),
            decoder=Decoder(**sizes, multipliers=decoder_multipliers, groups=norm_groups, **training),
            quantize=VectorQuantizer(
                codebook_size=codebook_size,
                codebook_dim=codebook_dim,
                l2_normalize=l2_normalize,
                commitment_weight=commitment_weight,
                entropy_weight=entropy_weight,
                entropy_temperature=entropy_temperature,
                usage_window=usage_window,
            ),
        )
        self._pixel_decoder = {
            **sizes,
            "codebook_dim": codebook_dim,
            "multipliers": list(decoder_multipliers),
            "norm_groups": norm_groups,
        }
        self.quant_conv = nn.Conv2d(z_channels, codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's last convolution."""
        return self.decoder.get_parameter("conv_out.weight")

    def pixel_decoder_config(self) -> dict[str, Any]:
        """Constructor arguments of the decoder with the convolution before it."""
        return {"_target_": "vgen.tokenizers.proxy.VQGANPixelDecoder", **self._pixel_decoder}

    def pixel_decoder_state(self) -> dict[str, Tensor]:
        """Their weights."""
        parts = ("post_quant_conv.", "decoder.")
        return {name: value for name, value in self.state_dict().items() if name.startswith(parts)}

    def hold_decoder(self, dtype: torch.dtype) -> bool:
        """Hold the decoder and the convolution before it in a dtype."""
        self.post_quant_conv.to(dtype)
        self.decoder.to(dtype)
        return True

    def latents(self, pixels: Tensor) -> Tensor:
        """Latents before quantization; see :meth:`GridVQ.latents`, [B, codebook_dim, h, w]."""
        check_pixels(pixels, self.stride)
        encode, _ = self._networks()
        return self.quant_conv(encode(pixels.to(self.quant_conv.weight.dtype)))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Quantized latents [B, codebook_dim, h, w] to float32 pixels [B, 3, H, W]."""
        _, features = self._networks()
        return self.decoder.conv_out(features(self.post_quant_conv(latents.to(self.last_layer.dtype)))).float()


def _check_sizes(**sizes: int) -> None:
    for key, size in sizes.items():
        if size < 1:
            raise UserError(f"tokenizer.{key}={size} must be at least 1")


def _check_multipliers(encoder: Sequence[int], decoder: Sequence[int]) -> int:
    """Stride of the tokenizer."""
    if not encoder or min(*encoder, *decoder, 1) < 1:
        raise UserError("tokenizer.encoder_multipliers and decoder_multipliers must list positive integers")
    if len(encoder) != len(decoder):
        raise UserError(
            f"tokenizer.encoder_multipliers has {len(encoder)} entries and decoder_multipliers {len(decoder)}; "
            "both decide the stride and must be equally long"
        )
    return 2 ** (len(encoder) - 1)
