"""What every tokenizer of pictures or clips offers to the rest of the house."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vgen.errors import UserError


@dataclass(frozen=True)
class TokenizerOutput:
    """Result of a training forward pass.

    Attributes:
        reconstruction: float32 [B, 3, H, W] or [B, 3, T, H, W], nominally in [-1, 1], not clamped.
        ids: int64 [B, N], token ids in raster order; N = 0 where there are none.
        losses: scalar terms of the quantizer, already weighted, ready to be summed.
    """

    reconstruction: Tensor
    ids: Tensor
    losses: dict[str, Tensor]


def check_pixels(pixels: Tensor, stride: int) -> None:
    """Refuse pictures that a network of a stride cannot encode.

    Raises:
        UserError: unless they are [B, 3, H, W] with sides divisible by the stride.
    """
    if pixels.dim() != 4 or pixels.shape[1] != 3:
        raise UserError(f"the tokenizer takes pixels [B, 3, H, W], got shape {list(pixels.shape)}")
    height, width = pixels.shape[2:]
    if height % stride or width % stride or not height * width:
        raise UserError(f"images of {height} x {width} pixels do not divide by the tokenizer stride {stride}")


class Autoencoder(nn.Module, ABC):
    """Turns pixels into something smaller and back; what all networks of ``task=tokenizer`` and its kin share.

    Attributes:
        image_size: side in pixels of the square images the network was configured for.
        codebook_size: number of distinct ids, 0 where the code is continuous.
        num_frames: frames of the clips it was configured for, None for pictures.
        training_progress: part of training done, 0..1, kept by the training loop for losses that change with it.
    """

    codebook_size = 0
    num_frames: int | None = None
    training_progress: float = 0.0

    def __init__(self, *, image_size: int):
        super().__init__()
        self.image_size = image_size

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's last layer, where the adaptive adversarial weight balances gradients."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] [B, 3, H, W] to what :meth:`decode` takes."""

    @abstractmethod
    def decode(self, code: Tensor) -> Tensor:
        """What :meth:`encode` gave to float32 pixels [B, 3, H, W], not clamped."""

    def reconstruct(self, pixels: Tensor) -> Tensor:
        """Encode and decode pixels in [-1, 1] [B, 3, H, W]; float32 of the same shape, not clamped."""
        return self.decode(self.encode(pixels))

    @abstractmethod
    def forward(self, pixels: Tensor) -> TokenizerOutput:
        """Encode with a gradient path and decode."""

    @abstractmethod
    def compile_parts(self) -> None:
        """Compile what training spends its time in, leaving the last layer eager; names of parameters stay."""


class Tokenizer(Autoencoder):
    """Turns pixels into a grid of integers and back; pixels of a video tokenizer are [B, 3, T, H, W].

    Attributes:
        image_size: side in pixels of the square images the tokenizer was configured for.
        num_frames: frames of the clips it was configured for, None for pictures.
        grid: shape of the token grid at that size.
        codebook_size: number of distinct ids; ids are 0 .. codebook_size - 1.
        decodes_prefixes: whether `decode` also takes the first k ids of a picture, for any k from 1 to `num_tokens`.
        latent_channels: channels C of continuous tokens, float [B, N, C] in place of ids; 0 where tokens are ids.
        text_length: text features that `decode_samples` takes for every sample, 0 for none.
    """

    decodes_prefixes = False
    latent_channels = 0
    text_length = 0

    def __init__(self, *, image_size: int, grid: tuple[int, ...], codebook_size: int):
        super().__init__(image_size=image_size)
        self.grid = grid
        self.codebook_size = codebook_size

    @property
    def num_tokens(self) -> int:
        """Tokens per image at `image_size`."""
        return math.prod(self.grid)

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """The vectors the decoder sees, float32 [K, C]."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] [B, 3, H, W] to ids int64 [B, N]."""

    @abstractmethod
    def decode(self, ids: Tensor) -> Tensor:
        """Ids int64 [B, N] to float32 pixels [B, 3, H, W], not clamped."""

    def decode_samples(self, ids: Tensor, sample_index: Tensor, seed: int, text: Tensor | None = None) -> Tensor:
        """Decode tokens of samples; where decoding draws noise, it is keyed by (seed, sample index), not by the ids.

        Args:
            ids: int64 [B, N], or [B, k] where the tokenizer decodes prefixes; continuous tokens [B, N, C].
            sample_index: int64 [B].
            seed: of the noise.
            text: float [B, text_length, E], for a tokenizer whose decoder sees text; null = none.

        Returns:
            As :meth:`decode`.
        """
        assert text is None, "only a text-aware tokenizer is told of text"
        return self.decode(ids)

    def hold_decoder(self, dtype: torch.dtype) -> bool:
        """Hold what only decoding uses in another dtype, in place, and compute in it without autocast, for sampling.

        Returns:
            Whether this tokenizer can; if not, nothing has changed.
        """
        return False

    @abstractmethod
    def forward(self, pixels: Tensor) -> TokenizerOutput:
        """Encode, quantize with a gradient path, and decode."""

    def statistics(self, ids: Tensor) -> dict[str, Tensor]:
        """Figures about code use worth logging, as scalars on the device of `ids` (int64 of any shape)."""
        return {"perplexity": perplexity(ids, self.codebook_size)}


def perplexity(ids: Tensor, codebook_size: int) -> Tensor:
    """Effective number of codes in a batch: exp of the entropy of the histogram of `ids`.

    Args:
        ids: int64 of any shape.
        codebook_size: number of codes.

    Returns:
        float32 scalar between 1 (a single code) and `codebook_size` (all equally often). Built without waiting for the
        device, unlike torch.bincount.
    """
    flat = ids.reshape(-1)
    counts = torch.zeros(codebook_size, device=ids.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype))
    return torch.special.entr(counts / flat.numel()).sum().exp()
