"""What convolutional tokenizers of one codebook on a 2D grid share: VQGAN and MaskGIT-VQGAN."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.tokenizers.base import TokenizerOutput
from vgen.tokenizers.convnet import Decoder
from vgen.tokenizers.proxy import PixelDecoder, ProxyTokenizer
from vgen.tokenizers.quantize import VectorQuantizer


class GridVQ(ProxyTokenizer):
    """A convolutional encoder and decoder around a vector quantizer.

    Images of any height and width divisible by the stride are accepted; `image_size` only fixes the usual token grid.

    Args:
        image_size: side in pixels of the images of this tokenizer.
        stride: pixels per token along either side; divides image_size.
        encoder: pixels to features at the resolution of the grid.
        decoder: the way back.
        quantize: the codebook.
    """

    def __init__(
        self,
        *,
        image_size: int,
        stride: int,
        encoder: nn.Module,
        decoder: Decoder | PixelDecoder,
        quantize: VectorQuantizer,
    ) -> None:
        side = image_size // stride
        super().__init__(image_size=image_size, grid=(side, side), codebook_size=quantize.codebook_size)
        self.stride = stride
        self.encoder: nn.Module = encoder
        self.decoder: Decoder | PixelDecoder = decoder
        self.quantize = quantize
        self._compiled: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None

    @abstractmethod
    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] [B, 3, H, W] to latents before quantization, [B, C, h, w].

        Raises:
            UserError: if the images do not have 3 channels or a side is not divisible by the stride.
        """

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Codes [B, C, h, w] to float32 pixels [B, 3, H, W] in about [-1, 1]."""

    @property
    def codebook(self) -> Tensor:
        """Codes as the decoder sees them, float32 [K, C]."""
        return self.quantize.codebook

    def compile_parts(self) -> None:
        """Compile the convolutional networks in place for training; names of parameters stay.

        The decoder's last layer stays outside, so that the adaptive adversarial weight can ask for gradients there
        without running a whole backward pass.
        """
        self._compiled = (torch.compile(self.encoder.forward), torch.compile(self.decoder.features))

    def _networks(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Encoder and decoder; only training uses the compiled ones: other modes and shapes would compile again."""
        if self._compiled and self.training and torch.is_grad_enabled():
            return self._compiled
        return self.encoder, self.decoder.features

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
