"""The convolutional VQ-GAN tokenizer of LlamaGen (arXiv 2406.06525, after Esser et al., 2021).

Module names are those of the published checkpoints.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.tokenizers.base import TokenizerOutput
from vgen.tokenizers.convnet import Decoder, Encoder
from vgen.tokenizers.proxy import ProxyTokenizer
from vgen.tokenizers.quantize import VectorQuantizer


class VQGAN(ProxyTokenizer):
    """Convolutional encoder and decoder around a vector quantizer.

    Images of any height and width divisible by the stride are accepted; `image_size` only fixes the usual token grid.

    Args:
        image_size: side in pixels of the images of this tokenizer.
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
        side = image_size // stride
        super().__init__(image_size=image_size, grid=(side, side), codebook_size=codebook_size)
        self.stride = stride
        self._pixel_decoder = {
            "codebook_dim": codebook_dim,
            "base_channels": base_channels,
            "multipliers": list(decoder_multipliers),
            "num_res_blocks": num_res_blocks,
            "z_channels": z_channels,
            "norm_groups": norm_groups,
        }
        self.encoder = Encoder(
            base_channels=base_channels,
            multipliers=encoder_multipliers,
            num_res_blocks=num_res_blocks,
            z_channels=z_channels,
            groups=norm_groups,
            dropout=dropout,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.decoder = Decoder(
            base_channels=base_channels,
            multipliers=decoder_multipliers,
            num_res_blocks=num_res_blocks,
            z_channels=z_channels,
            groups=norm_groups,
            dropout=dropout,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.quantize = VectorQuantizer(
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            l2_normalize=l2_normalize,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
            usage_window=usage_window,
        )
        self.quant_conv = nn.Conv2d(z_channels, codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1)
        self._compiled: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None

    @property
    def codebook(self) -> Tensor:
        """Codes as the decoder sees them, float32 [K, C]."""
        return self.quantize.codebook

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's last convolution."""
        return self.decoder.get_parameter("conv_out.weight")

    def compile_parts(self) -> None:
        """Compile the convolutional networks in place for training; names of parameters stay.

        The decoder's last layer stays outside, so that the adaptive adversarial weight can ask for gradients there
        without running a whole backward pass.
        """
        self._compiled = (torch.compile(self.encoder.forward), torch.compile(self.decoder.features))

    def _trains(self) -> bool:
        """Only training uses the compiled networks: other modes and shapes would compile again."""
        return self.training and torch.is_grad_enabled()

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
        """Latents before quantization, [B, codebook_dim, h, w].

        Raises:
            UserError: if the images do not have 3 channels or a side is not divisible by the stride.
        """
        if pixels.dim() != 4 or pixels.shape[1] != 3:
            raise UserError(f"the tokenizer takes pixels [B, 3, H, W], got shape {list(pixels.shape)}")
        height, width = pixels.shape[2:]
        if height % self.stride or width % self.stride or not height * width:
            raise UserError(f"images of {height} x {width} pixels do not divide by the tokenizer stride {self.stride}")
        encode = self._compiled[0] if self._compiled and self._trains() else self.encoder
        return self.quant_conv(encode(pixels.to(self.quant_conv.weight.dtype)))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Quantized latents [B, codebook_dim, h, w] to float32 pixels [B, 3, H, W]."""
        features = self._compiled[1] if self._compiled and self._trains() else self.decoder.features
        return self.decoder.conv_out(features(self.post_quant_conv(latents.to(self.last_layer.dtype)))).float()

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] [B, 3, H, W] to ids int64 [B, N] in raster order."""
        latents = self.latents(pixels)
        with torch.autocast(latents.device.type, enabled=False):
            ids = self.quantize.nearest(self.quantize.rows(latents), self.codebook)
        return ids.view(len(pixels), -1)

    def decode(self, ids: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Ids to pixels.

        Args:
            ids: int64 [B, N] in raster order.
            grid: (rows, columns) when the image is not `image_size` square.

        Returns:
            float32 [B, 3, rows * stride, columns * stride], not clamped.

        Raises:
            UserError: if the number of ids does not fit the grid.
        """
        rows, columns = self.grid if grid is None else grid
        if ids.dim() != 2 or ids.shape[1] != rows * columns:
            raise UserError(
                f"ids of shape {list(ids.shape)} do not fill a token grid of {rows} x {columns}; pass grid="
            )
        codes = self.quantize.lookup(ids).transpose(1, 2).unflatten(2, (rows, columns))
        return self.decode_latents(codes)

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        """Reconstruct pixels [B, 3, H, W] with gradients through the quantizer."""
        quantized = self.quantize(self.latents(pixels))
        return TokenizerOutput(self.decode_latents(quantized.latent), quantized.ids, quantized.losses)

    def statistics(self, ids: Tensor) -> dict[str, Tensor]:
        """Perplexity of `ids` and the share of the codebook used in the recent window of training tokens."""
        return super().statistics(ids) | {"codebook_usage": self.quantize.usage()}


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
