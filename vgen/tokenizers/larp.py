"""LARP: clips to a sequence of holistic tokens read out by learned queries (arXiv 2410.21264).

Module names are those of the published checkpoints.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.layers.sincos import sincos_1d, sincos_3d
from vgen.tokenizers.base import Tokenizer, TokenizerOutput
from vgen.tokenizers.larp_prior import LARPPrior
from vgen.tokenizers.larp_quantizer import StochasticQuantizer
from vgen.tokenizers.larp_transformer import (
    FinalLayer,
    ParallelTransformer,
    PatchEmbed,
    init_linear,
    unpatchify,
)


class _Bottleneck(nn.Module):
    """Projection to codes, quantizer, projection back; only here for the published names."""

    def __init__(self, in_dim: int, out_dim: int, quantizer: StochasticQuantizer, codebook_dim: int):
        super().__init__()
        self.in_linear = nn.Linear(in_dim, codebook_dim)
        self.out_linear = nn.Linear(codebook_dim, out_dim)
        self.regularizer = quantizer


class LARP(Tokenizer):
    """Transformer encoder and decoder around a stochastic quantizer, with a learned autoregressive prior.

    Tokens belong to no patch: token n is what query n read from the whole clip. Clips shorter than `num_frames` are
    accepted; they give as many tokens as full ones.

    Args:
        image_size: side in pixels of the frames.
        num_frames: frames of a clip.
        patch: (frames, rows, columns) of a patch.
        num_tokens: number of queries, hence of tokens.
        nominal_grid: shape under which the sequence is presented to generators, such as NAR's (4, 16, 16); null for
            the sequence it is.
        encoder_dim: width of the encoder.
        encoder_depth: number of its blocks.
        encoder_heads: its attention heads.
        decoder_dim: width of the decoder.
        decoder_depth: number of its blocks.
        decoder_heads: its attention heads.
        codebook_size: number of codes.
        codebook_dim: length of a code.
        l2_normalize: use unit vectors as codes.
        stochastic_temperature: of the random choice of codes in training; 0 takes the nearest.
        quantizer_weight: weight of codebook and commitment loss in the objective.
        commitment_weight: weight of the commitment loss beside the codebook loss.
        entropy_weight: weight of the entropy loss, likewise (needs stochastic_temperature = 0).
        entropy_temperature: temperature inside the entropy loss.
        prior: arguments of :class:`vgen.tokenizers.larp_prior.LARPPrior`, null for none.
        prior_weight: weight of the prior's cross-entropy in the objective.
        query_init_std: standard deviation of the queries at the start.
        usage_window: tokens over which codebook usage is counted.
        gradient_checkpointing: recompute blocks in the backward pass instead of storing their activations.

    Raises:
        UserError: if the options contradict each other.
    """

    def __init__(
        self,
        *,
        image_size: int,
        num_frames: int,
        patch: Sequence[int],
        num_tokens: int,
        nominal_grid: Sequence[int] | None,
        encoder_dim: int,
        encoder_depth: int,
        encoder_heads: int,
        decoder_dim: int,
        decoder_depth: int,
        decoder_heads: int,
        codebook_size: int,
        codebook_dim: int,
        l2_normalize: bool,
        stochastic_temperature: float,
        quantizer_weight: float,
        commitment_weight: float,
        entropy_weight: float,
        entropy_temperature: float,
        prior: dict[str, Any] | None,
        prior_weight: float,
        query_init_std: float,
        usage_window: int,
        gradient_checkpointing: bool,
    ):
        _check_sizes(image_size, num_frames, patch, num_tokens, nominal_grid)
        for key, dim, heads in (("encoder", encoder_dim, encoder_heads), ("decoder", decoder_dim, decoder_heads)):
            if heads < 1 or dim % heads or dim % 4:
                raise UserError(f"tokenizer.{key}_dim={dim} must be a multiple of 4 and of {key}_heads={heads}")
        for key, weight in (("quantizer_weight", quantizer_weight), ("prior_weight", prior_weight)):
            if weight < 0:
                raise UserError(f"tokenizer.{key}={weight} must not be negative")
        super().__init__(
            image_size=image_size,
            grid=tuple(nominal_grid) if nominal_grid else (num_tokens,),
            codebook_size=codebook_size,
        )
        self.num_frames: int = num_frames
        self.patch = (patch[0], patch[1], patch[2])
        self.patch_grid = (num_frames // patch[0], image_size // patch[1], image_size // patch[2])
        self.quantizer_weight, self.prior_weight = quantizer_weight, prior_weight
        self.x_embedder = PatchEmbed(encoder_dim, self.patch)
        self.encoder_patch_pe: Tensor
        self.decoder_latent_pe: Tensor
        self.decoder_patch_query_embed: Tensor
        self.register_buffer("encoder_patch_pe", sincos_3d(encoder_dim, self.patch_grid)[None])
        self.encoder_latent_query_embed = nn.Parameter(torch.randn(num_tokens, encoder_dim) * query_init_std)
        self.encoder = ParallelTransformer(
            dim=encoder_dim, heads=encoder_heads, depth=encoder_depth, gradient_checkpointing=gradient_checkpointing
        )
        quantizer = StochasticQuantizer(
            temperature=stochastic_temperature,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            l2_normalize=l2_normalize,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
            usage_window=usage_window,
        )
        self.bottleneck = _Bottleneck(encoder_dim, decoder_dim, quantizer, codebook_dim)
        self.register_buffer("decoder_latent_pe", sincos_1d(decoder_dim, torch.arange(num_tokens)).float()[None])
        self.register_buffer("decoder_patch_query_embed", sincos_3d(decoder_dim, self.patch_grid)[None])
        self.decoder_patch_query_token_type_embed = nn.Parameter(torch.randn(1, 1, decoder_dim) * query_init_std)
        self.decoder = ParallelTransformer(
            dim=decoder_dim, heads=decoder_heads, depth=decoder_depth, gradient_checkpointing=gradient_checkpointing
        )
        self.final_layer = FinalLayer(decoder_dim, self.patch)
        self.prior_model: LARPPrior | None = None
        if prior is not None:
            self.prior_model = LARPPrior(num_tokens=num_tokens, codebook_dim=codebook_dim, **prior)
        self.apply(init_linear)
        nn.init.zeros_(self.final_layer.linear.weight)
        self._compiled: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None

    @property
    def codebook(self) -> Tensor:
        """Codes as the decoder sees them, float32 [K, C]."""
        return self.bottleneck.regularizer.codebook

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the layer that makes patch values."""
        return self.final_layer.get_parameter("linear.weight")

    def compile_parts(self) -> None:
        """Compile the two transformers in place for training; names of parameters stay."""
        self._compiled = (torch.compile(self.encoder.forward), torch.compile(self.decoder.forward))

    def _transformers(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """Only training uses the compiled networks: other modes and shapes would compile again."""
        trains = self.training and torch.is_grad_enabled()
        return self._compiled if self._compiled and trains else (self.encoder, self.decoder)

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        """Embedded patches of pixels in [-1, 1] [B, 3, T, H, W] without positions, [B, patches, encoder_dim].

        Raises:
            UserError: if the clips are of another size, longer than `num_frames`, or end inside a patch.
        """
        if pixels.dim() != 5 or pixels.shape[1] != 3 or pixels.shape[3:] != (self.image_size, self.image_size):
            raise UserError(
                f"the tokenizer takes clips [B, 3, T, {self.image_size}, {self.image_size}], got {list(pixels.shape)}"
            )
        frames = pixels.shape[2]
        if frames % self.patch[0] or not 0 < frames <= self.num_frames:
            valid = ", ".join(str(n) for n in range(self.patch[0], self.num_frames + 1, self.patch[0]))
            raise UserError(f"clips of {frames} frames do not fit this tokenizer; possible are {valid} frames")
        # The network wants 0..1.
        return self.x_embedder((pixels.to(self.last_layer.dtype) + 1) / 2)

    def features(self, pixels: Tensor) -> Tensor:
        """What the queries read from clips, [B, num_tokens, encoder_dim]."""
        patches = self.patch_tokens(pixels)
        patches = patches + self.encoder_patch_pe[:, : patches.shape[1]]
        queries = self.encoder_latent_query_embed.expand(len(patches), -1, -1)
        return self._transformers()[0](patches, queries)

    def latents(self, pixels: Tensor) -> Tensor:
        """Latents before quantization, [B, num_tokens, codebook_dim]."""
        return self.bottleneck.in_linear(self.features(pixels))

    def decoded_patches(self, latents: Tensor, frames: int) -> Tensor:
        """Decoder output for quantized latents [B, num_tokens, codebook_dim], [B, patches, decoder_dim]."""
        context = self.bottleneck.out_linear(latents.to(self.last_layer.dtype)) + self.decoder_latent_pe
        patches = frames // self.patch[0] * self.patch_grid[1] * self.patch_grid[2]
        queries = self.decoder_patch_query_embed[:, :patches] + self.decoder_patch_query_token_type_embed
        return self._transformers()[1](context, queries.expand(len(context), -1, -1))

    def decode_latents(self, latents: Tensor, frames: int) -> Tensor:
        """Quantized latents [B, num_tokens, codebook_dim] to float32 pixels [B, 3, frames, H, W], not clamped."""
        values = self.final_layer(self.decoded_patches(latents, frames)).float()
        grid = (frames // self.patch[0], *self.patch_grid[1:])
        return unpatchify(values, grid, self.patch) * 2 - 1

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Clips to token ids.

        Args:
            pixels: in [-1, 1], [B, 3, T, H, W].
            generator: draw the codes at random as in training, with this generator; the nearest codes without it.

        Returns:
            int64 [B, num_tokens].

        Raises:
            UserError: if random codes are asked of a quantizer without a temperature.
        """
        quantizer = self.bottleneck.regularizer
        latents = self.latents(pixels)
        with torch.autocast(latents.device.type, enabled=False):
            rows = quantizer.rows(latents.transpose(1, 2).unsqueeze(3))
            if generator is None:
                ids = quantizer.nearest(rows, self.codebook)
            elif quantizer.temperature == 0:
                raise UserError("random encoding needs tokenizer.stochastic_temperature above 0")
            else:
                ids = quantizer.draw(rows, self.codebook, generator)
        return ids.view(len(pixels), -1)

    def decode(self, ids: Tensor, frames: int | None = None) -> Tensor:
        """Ids to pixels.

        Args:
            ids: int64 [B, num_tokens].
            frames: length of the clips if not `num_frames`.

        Returns:
            float32 [B, 3, frames, H, W], not clamped.

        Raises:
            UserError: if the number of ids is not `num_tokens`.
        """
        if ids.dim() != 2 or ids.shape[1] != self.num_tokens:
            raise UserError(f"ids of shape {list(ids.shape)} are not [B, {self.num_tokens}] as this tokenizer needs")
        return self.decode_latents(self.bottleneck.regularizer.lookup(ids), frames or self.num_frames)

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        """Reconstruct clips [B, 3, T, H, W] with gradients through the quantizer; the prior judges the codes."""
        quantizer = self.bottleneck.regularizer
        codes, ids, losses = quantizer.sequence(self.latents(pixels))
        losses = {name: self.quantizer_weight * loss for name, loss in losses.items()}
        if self.prior_model is not None and self.training:
            judged = self.prior_model(codes, ids, quantizer.unit_codebook(), progress=self.training_progress)
            losses["prior"] = self.prior_weight * judged.loss
        return TokenizerOutput(self.decode_latents(codes, pixels.shape[2]), ids, losses)

    def statistics(self, ids: Tensor) -> dict[str, Tensor]:
        """Perplexity of `ids` and the share of the codebook used in the recent window of training tokens."""
        return super().statistics(ids) | {"codebook_usage": self.bottleneck.regularizer.usage()}


def _check_sizes(
    image_size: int, num_frames: int, patch: Sequence[int], num_tokens: int, nominal_grid: Sequence[int] | None
) -> None:
    if len(patch) != 3 or min(patch) < 1:
        raise UserError(f"tokenizer.patch={list(patch)} must be three positive numbers: frames, rows, columns")
    if num_frames < 1 or num_frames % patch[0]:
        raise UserError(f"tokenizer.num_frames={num_frames} must be a positive multiple of the patch's {patch[0]}")
    if image_size < 1 or image_size % patch[1] or image_size % patch[2]:
        raise UserError(f"tokenizer.image_size={image_size} must be a multiple of the patch's {patch[1]}x{patch[2]}")
    if num_tokens < 2:
        raise UserError(f"tokenizer.num_tokens={num_tokens} must be at least 2")
    if nominal_grid and math.prod(nominal_grid) != num_tokens:
        raise UserError(f"tokenizer.nominal_grid={list(nominal_grid)} does not have num_tokens={num_tokens} places")
