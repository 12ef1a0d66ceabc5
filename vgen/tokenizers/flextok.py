"""FlexTok (arXiv 2502.13967): pictures as 1 to K ordered tokens, decoded by a rectified flow over VAE latents."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.random import keyed_normal
from vgen.tokenizers.autoencoder_kl import AutoencoderKL
from vgen.tokenizers.base import Tokenizer, TokenizerOutput
from vgen.tokenizers.flextok_networks import FlowDecoder, RegisterEncoder
from vgen.tokenizers.flow import FlowSampling, integrate
from vgen.tokenizers.flow_guidance import GuidedVelocity
from vgen.tokenizers.fsq import FSQ

_NOISE_STREAM = 301
_MIX = 0x9E3779B97F4A7C15 % 2**61


class FlexTok(Tokenizer):
    """A frozen VAE, a register encoder with FSQ, and a rectified-flow decoder.

    Any prefix of a picture's tokens can be decoded: the decoder was trained with the tail replaced by a mask token.

    Args:
        vae: continuous autoencoder; its `image_size` is the tokenizer's. Always frozen and in evaluation mode.
        num_tokens: tokens K per picture.
        levels: FSQ levels; their product is the codebook size.
        encoder: arguments of :class:`vgen.tokenizers.flextok_networks.RegisterEncoder`: dim, depth and optional ones.
        decoder: arguments of :class:`vgen.tokenizers.flextok_networks.FlowDecoder`: dim, depth and optional ones.
        patch: side of a patch in latents, of both networks.
        decoding: how `decode` samples; can be replaced at any time.

    Raises:
        UserError: for options that do not fit.
    """

    decodes_prefixes = True

    def __init__(
        self,
        *,
        vae: AutoencoderKL,
        num_tokens: int = 256,
        levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        encoder: Mapping[str, Any],
        decoder: Mapping[str, Any],
        patch: int = 2,
        decoding: FlowSampling | None = None,
    ) -> None:
        side = vae.image_size // vae.stride
        if patch < 1 or side % patch:
            raise UserError(f"tokenizer.patch={patch} must divide the {side} latents per side of the VAE")
        fsq = FSQ(levels=levels)
        super().__init__(image_size=vae.image_size, grid=(num_tokens,), codebook_size=fsq.codebook_size)
        self.vae, self.fsq = vae.eval().requires_grad_(False), fsq
        self.decoding = decoding or FlowSampling()
        common: dict[str, Any] = {
            "channels": vae.latent_channels,
            "grid": (side // patch, side // patch),
            "num_registers": num_tokens,
            "code_dim": fsq.dim,
            "patch": patch,
        }
        self.encoder = _network(RegisterEncoder, "tokenizer.encoder", common, encoder)
        self.decoder = _network(FlowDecoder, "tokenizer.decoder", common, decoder)

    def train(self, mode: bool = True) -> "FlexTok":
        """Set the mode of the two transformers; the VAE stays in evaluation mode."""
        super().train(mode)
        self.vae.eval()
        return self

    @property
    def codebook(self) -> Tensor:
        """All FSQ codes, float32 [codebook_size, channels]."""
        return self.fsq.codebook

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of a picture's latents."""
        side = self.image_size // self.vae.stride
        return self.vae.latent_channels, side, side

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the flow decoder's last layer."""
        return self.decoder.get_parameter("head.weight")

    def compile_parts(self) -> None:
        """Compile every block of both transformers in place; names of parameters stay."""
        self.encoder.compile_blocks()
        self.decoder.compile_blocks()

    def latents(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled VAE latents, without gradients.

        Args:
            pixels: in [-1, 1], [B, 3, image_size, image_size].
            noise: standard normal, to sample the posterior instead of taking its mean.

        Raises:
            UserError: for another image size.
        """
        size = self.image_size
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise UserError(
                f"this FlexTok encodes pixels [B, 3, {size}, {size}], got shape {list(pixels.shape)}; resize and crop "
                f"the pictures to {size} x {size}"
            )
        with torch.no_grad():
            return self.vae.encode(pixels, noise)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels to ids int64 [B, K], coarse to fine; arguments and errors as in :meth:`latents`.

        Without noise the ids are a function of the picture; the original samples the posterior by default.
        """
        return self.fsq(self.encoder(self.latents(pixels, noise)))[1]

    def decode(
        self,
        ids: Tensor,
        *,
        sample_index: Tensor | None = None,
        seed: int = 0,
        decoding: FlowSampling | None = None,
    ) -> Tensor:
        """Ids of any prefix to pixels.

        The noise of the flow is keyed, so that a picture does not depend on its batch: by (seed, sample index) where
        indices are given, otherwise by the seed and the ids themselves, which makes decoding a function of the ids.

        Args:
            ids: int64 [B, k], 1 <= k <= K.
            sample_index: int64 [B], non-negative.
            seed: of the noise.
            decoding: steps, solver and guidance; None = the tokenizer's own.

        Returns:
            float32 [B, 3, image_size, image_size], not clamped.

        Raises:
            UserError: for a wrong number of ids or ids outside the codebook.
        """
        self.check_ids(ids)
        noise = self.noise(_content_key(ids) if sample_index is None else sample_index.to(ids.device), seed)
        return self.vae.decode(self.decode_latents(ids, noise, decoding=decoding))

    def decode_samples(self, ids: Tensor, sample_index: Tensor, seed: int, text: Tensor | None = None) -> Tensor:
        """Decode with noise keyed by (seed, sample index); arguments and errors as in :meth:`decode`."""
        assert text is None, "FlexTok sees no text"
        return self.decode(ids, sample_index=sample_index, seed=seed)

    def check_ids(self, ids: Tensor) -> None:
        """Refuse ids that are no prefix of a picture's tokens.

        Raises:
            UserError: naming what is wrong.
        """
        if ids.dim() != 2 or not 1 <= ids.shape[1] <= self.num_tokens:
            raise UserError(
                f"ids of shape {list(ids.shape)} are no prefix of a picture's tokens; this tokenizer decodes [B, k] "
                f"with 1 <= k <= {self.num_tokens}"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.codebook_size:
            raise UserError(f"token ids must lie in 0..{self.codebook_size - 1}; these are of another codebook")

    def noise(self, keys: Tensor, seed: int) -> Tensor:
        """Standard normal noise [B, C, h, w] for one key (int64 [B], below 2**62) per picture."""
        position = torch.arange(math.prod(self.latent_shape), device=keys.device)
        return keyed_normal(seed, _NOISE_STREAM, keys[:, None], position).view(-1, *self.latent_shape)

    def decode_latents(
        self,
        ids: Tensor,
        noise: Tensor,
        *,
        keep: Tensor | None = None,
        decoding: FlowSampling | None = None,
        plain: bool = False,
    ) -> Tensor:
        """Sample scaled latents.

        Args:
            ids: int64 [B, k].
            noise: start of the flow, [B, C, h, w].
            keep: int64 [B], where fewer than k tokens of a sample are to be used.
            decoding: see :meth:`decode`.
            plain: run all K registers instead of the shorter, equal sequence.
        """
        decoding = decoding or self.decoding
        codes = self.fsq.codes(ids)
        known = self.decoder.condition(codes, keep) if plain else self.decoder.short_condition(codes, keep)
        nothing = self.decoder.null_condition(len(ids))
        if plain:
            nothing = self.decoder.condition(codes, null=torch.ones(len(ids), dtype=torch.bool, device=ids.device))

        def velocity(condition: Any) -> Any:
            return lambda x, time: self.decoder(x, torch.full((len(x),), time, device=x.device), condition).velocity

        guided = GuidedVelocity(velocity(known), velocity(nothing), decoding.guidance)
        return integrate(guided, noise, steps=decoding.steps, solver=decoding.solver)

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        """Encode and decode all K tokens; training goes through the two transformers instead (FlexTokModule)."""
        ids = self.encode(pixels)
        return TokenizerOutput(self.decode(ids), ids, {})

    def with_decoding(self, **changes: Any) -> FlowSampling:
        """The tokenizer's decoding settings with some replaced; `guidance` may be a mapping of changes."""
        guidance = changes.pop("guidance", {})
        if isinstance(guidance, Mapping):
            guidance = replace(self.decoding.guidance, **guidance)
        return replace(self.decoding, guidance=guidance, **changes)


def _content_key(ids: Tensor) -> Tensor:
    """One number in [0, 2**61) per row of ids int64 [B, k]: equal rows share it, others hardly ever do."""
    key = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    for column in ids.unbind(1):
        key = ((key ^ (key >> 29)) * 0xBF58476D + column + 1) * _MIX & 2**61 - 1
    return key


def _network(network: type, key: str, common: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    try:
        return network(**common, **options)
    except TypeError as error:
        raise UserError(f"{key}: {str(error).removeprefix(network.__name__)}") from error
