"""Tokenizers whose codes TiTok may be taught to predict, and their decoders as parts of a TiTok."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vgen.tokenizers.base import Tokenizer
from vgen.tokenizers.convnet import Decoder


class PixelDecoder(nn.Module):
    """Code vectors on a grid to images in about [0, 1].

    Attributes:
        code_channels: length of a code vector.
        stride: pixels per grid cell.
    """

    code_channels: int
    stride: int

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""

    @abstractmethod
    def features(self, codes: Tensor) -> Tensor:
        """Code vectors [B, code_channels, h, w] to what the last layer sees."""

    @abstractmethod
    def finish(self, features: Tensor) -> Tensor:
        """Apply the last layer: images [B, 3, h * stride, w * stride], not clamped."""

    def forward(self, codes: Tensor) -> Tensor:
        """Code vectors [B, code_channels, h, w] to images [B, 3, h * stride, w * stride], not clamped."""
        return self.finish(self.features(codes))


class ProxyTokenizer(Tokenizer):
    """A tokenizer on a square grid whose decoder can be built and filled apart from the rest."""

    @abstractmethod
    def pixel_decoder_config(self) -> dict[str, Any]:
        """Constructor arguments of the decoder as a :class:`PixelDecoder`, with ``_target_``, plain containers."""

    @abstractmethod
    def pixel_decoder_state(self) -> dict[str, Tensor]:
        """Its state dict."""


class VQGANPixelDecoder(PixelDecoder):
    """Decoder of :class:`vgen.tokenizers.vqgan.VQGAN` together with the convolution before it.

    Args:
        codebook_dim: length of a code vector.
        base_channels: channels at full resolution.
        multipliers: of the channels per resolution, highest resolution first.
        num_res_blocks: residual blocks per resolution, less one.
        z_channels: channels that the decoder takes.
        norm_groups: groups of the group normalisation.
    """

    def __init__(
        self,
        *,
        codebook_dim: int,
        base_channels: int,
        multipliers: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        norm_groups: int,
    ):
        super().__init__()
        self.code_channels = codebook_dim
        self.stride = 2 ** (len(multipliers) - 1)
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1)
        self.decoder = Decoder(
            base_channels=base_channels,
            multipliers=multipliers,
            num_res_blocks=num_res_blocks,
            z_channels=z_channels,
            groups=norm_groups,
            dropout=0.0,
            gradient_checkpointing=False,
        )

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's last convolution."""
        return self.decoder.get_parameter("conv_out.weight")

    def features(self, codes: Tensor) -> Tensor:
        """Code vectors to what the last convolution sees."""
        return self.decoder.features(self.post_quant_conv(codes))

    def finish(self, features: Tensor) -> Tensor:
        """The last convolution; the VQGAN itself works in [-1, 1]."""
        return (self.decoder.conv_out(features) + 1.0) / 2.0
