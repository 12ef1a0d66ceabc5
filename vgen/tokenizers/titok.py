"""TiTok, the 1D image tokenizer (arXiv 2406.07550), and its text-aware form TA-TiTok (arXiv 2501.07730).

Module names are those of the published checkpoints. Like the originals the networks work in [0, 1]; the conversion from
and to [-1, 1] happens here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.layers.vit import init_vit
from vgen.tokenizers.base import Tokenizer, TokenizerOutput
from vgen.tokenizers.bottleneck import ClusteringQuantizer, GaussianBottleneck, GaussianLatent
from vgen.tokenizers.proxy import PixelDecoder
from vgen.tokenizers.quantize import VectorQuantizer
from vgen.tokenizers.titok_vit import LAYOUTS, LatentDecoder, LatentEncoder, LatentLayout

Bottleneck = Literal["vq", "clustering_vq", "gaussian"]
Head = Literal["pixel", "proxy"]
ProxyMix = Literal["soft", "hard"]


@dataclass(frozen=True)
class ProxyPrediction:
    """Result of a stage-1 training pass.

    Attributes:
        logits: of the proxy codes, [B, V, g, g].
        ids: int64 [B, K].
        losses: scalar terms of the bottleneck, already weighted.
    """

    logits: Tensor
    ids: Tensor
    losses: dict[str, Tensor]


class _Codebook(nn.Module):
    """Code vectors of the proxy tokenizer, under the published name."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(size, dim)


class TiTok(Tokenizer):
    """A ViT encoder to K latent tokens, a bottleneck, and a ViT decoder that paints a grid of mask tokens.

    An instance is tied to its image size and its K by learned positions.

    Args:
        image_size: side in pixels of the square images.
        patch_size: side of the encoder's patches, a divisor of image_size.
        num_latent_tokens: tokens per image, K.
        token_size: channels of a code or latent.
        encoder: ``width``, ``layers`` and ``heads`` of the encoder.
        decoder: the same of the decoder.
        codebook_size: number of codes (bottleneck vq and clustering_vq).
        l2_normalize: use unit vectors as codes.
        commitment_weight: weight of the commitment loss.
        bottleneck: ``vq``, ``clustering_vq`` (the same network, whose unused codes move to nearby features in training)
            or ``gaussian`` (continuous latents without ids, for reconstruction and generators with a latent head).
        kl_weight: weight of the divergence of ``gaussian``.
        latent_layout: ``per_token``, or ``legacy`` for the published two-stage models, see
            :func:`vgen.tokenizers.titok_vit.mix_legacy`.
        head: ``pixel`` (single stage) or ``proxy`` (two stages: the decoder predicts another tokenizer's codes, which
            that tokenizer's decoder turns into pixels).
        decoder_patch_size: side of the patches that the decoder paints; None = patch_size.
        proxy_codebook_size: number of proxy codes; head=proxy needs it.
        pixel_decoder: decoder of the proxy tokenizer; None with head=proxy is the network of the original's first
            stage, which cannot make pixels.
        proxy_mix: input of the pixel decoder: ``soft``, the expectation of the code under the predicted distribution
            (second stage and published weights), or ``hard``, the most probable code (first stage).
        text_length: text tokens that the decoder sees, 0 for none (TA-TiTok: 77).
        text_dim: width of their features (CLIP ViT-L/14: 768).
        init_std: deviation of the initial weights, 0.02 as published; narrow networks leave the state in which all
            images get the same latents sooner with about 0.02 * sqrt(1024 / width).
        usage_window: tokens over which codebook usage is counted.
        gradient_checkpointing: recompute blocks in the backward pass instead of storing their activations.

    Raises:
        UserError: if the options contradict each other.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_latent_tokens: int,
        token_size: int,
        encoder: Mapping[str, int],
        decoder: Mapping[str, int],
        codebook_size: int = 0,
        l2_normalize: bool = False,
        commitment_weight: float = 0.25,
        bottleneck: Bottleneck = "vq",
        kl_weight: float = 1e-6,
        latent_layout: LatentLayout = "per_token",
        head: Head = "pixel",
        decoder_patch_size: int | None = None,
        proxy_codebook_size: int | None = None,
        pixel_decoder: PixelDecoder | None = None,
        proxy_mix: ProxyMix = "soft",
        text_length: int = 0,
        text_dim: int = 768,
        init_std: float = 0.02,
        usage_window: int = 65536,
        gradient_checkpointing: bool = False,
    ):
        gaussian = bottleneck == "gaussian"
        painted = decoder_patch_size or patch_size
        _check_names(bottleneck=bottleneck, latent_layout=latent_layout, head=head, proxy_mix=proxy_mix)
        _check_patches(image_size, patch_size, painted)
        if min(num_latent_tokens, token_size) < 1 or text_length < 0:
            raise UserError("tokenizer.num_latent_tokens and token_size must be at least 1, text_length at least 0")
        if init_std <= 0:
            raise UserError(f"tokenizer.init_std={init_std} must be positive (0.02 as published)")
        if not gaussian and codebook_size < 1:
            raise UserError(f"tokenizer.codebook_size={codebook_size} must be at least 1 with bottleneck={bottleneck}")
        if gaussian and codebook_size:
            raise UserError("tokenizer.codebook_size has no effect with bottleneck=gaussian; set it to 0")
        if gaussian and head == "proxy":
            raise UserError("bottleneck=gaussian has no two-stage training (as in the original); use head=pixel")
        _check_head(head, proxy_codebook_size, pixel_decoder, painted)
        super().__init__(image_size=image_size, grid=(num_latent_tokens,), codebook_size=codebook_size)
        self.latent_channels = token_size if gaussian else 0
        self.head, self.proxy_mix, self.text_length, self.text_dim = head, proxy_mix, text_length, text_dim
        self.proxy_codebook_size = proxy_codebook_size
        self.encoder = LatentEncoder(
            image_size=image_size,
            patch_size=patch_size,
            num_latents=num_latent_tokens,
            out_channels=2 * token_size if gaussian else token_size,
            layout=latent_layout,
            gradient_checkpointing=gradient_checkpointing,
            **_sizes("encoder", encoder),
        )
        init = partial(init_vit, std=init_std)
        self.encoder.apply(init)
        self.latent_tokens = nn.Parameter(encoder["width"] ** -0.5 * torch.randn(num_latent_tokens, encoder["width"]))
        self.decoder = LatentDecoder(
            grid_side=image_size // painted,
            num_latents=num_latent_tokens,
            in_channels=token_size,
            patch_size=painted if head == "pixel" else None,
            proxy_codes=proxy_codebook_size or 0,
            text_length=text_length,
            text_dim=text_dim,
            gradient_checkpointing=gradient_checkpointing,
            **_sizes("decoder", decoder),
        )
        if not text_length:
            # TA-TiTok makes its decoder after the initialisation, so it starts from torch's defaults.
            self.decoder.apply(init)
        self.quantize: VectorQuantizer | GaussianBottleneck
        if gaussian:
            self.quantize = GaussianBottleneck(kl_weight=kl_weight)
        else:
            make = ClusteringQuantizer if bottleneck == "clustering_vq" else VectorQuantizer
            self.quantize = make(
                codebook_size=codebook_size,
                codebook_dim=token_size,
                l2_normalize=l2_normalize,
                commitment_weight=commitment_weight,
                usage_window=usage_window,
            )
            nn.init.uniform_(self.quantize.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)
        self.pixel_quantize: _Codebook | None = None
        self.pixel_decoder: PixelDecoder | None = None
        if pixel_decoder is not None:
            self.pixel_quantize = _Codebook(proxy_codebook_size or 0, pixel_decoder.code_channels)
            self.pixel_decoder = pixel_decoder
        self._compiled: dict[str, Callable[..., Tensor]] = {}

    @property
    def codebook(self) -> Tensor:
        """Codes as the decoder sees them, float32 [V, C].

        Raises:
            UserError: with continuous latents.
        """
        return self._vq().codebook

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer before the pixels, or before the proxy logits where there are none."""
        if self.pixel_decoder is not None:
            return self.pixel_decoder.last_layer
        return self.decoder.get_parameter("conv_out.weight" if self.head == "pixel" else "ffn.2.weight")

    def _vq(self) -> VectorQuantizer:
        if isinstance(self.quantize, GaussianBottleneck):
            raise UserError(
                "this TiTok has continuous latents (bottleneck=gaussian) and therefore no token ids; it can be trained "
                "and its reconstructions measured, but generators of ids need a tokenizer with bottleneck=vq (or "
                "choose one with a latent head: generator=maskgen_kl_l)"
            )
        return self.quantize

    def compile_parts(self) -> None:
        """Compile the transformers and the pixel decoder for training; the last layer and all names stay."""
        self._compiled = {"encoder": torch.compile(self.encoder.forward)}
        self._compiled["decoder"] = torch.compile(self.decoder.features)
        if self.pixel_decoder is not None:
            self._compiled["pixels"] = torch.compile(self.pixel_decoder.features)

    def _part(self, name: str, eager: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Only training uses the compiled networks: other modes and shapes would compile again."""
        return self._compiled.get(name, eager) if self.training and torch.is_grad_enabled() else eager

    def latents(self, pixels: Tensor) -> Tensor:
        """What the encoder hands to the bottleneck.

        Args:
            pixels: [B, 3, image_size, image_size] in [-1, 1].

        Returns:
            [B, C, 1, K], with C twice the token size for a Gaussian.

        Raises:
            UserError: for images of another size.
        """
        size = self.image_size
        if pixels.dim() != 4 or pixels.shape[1:] != (3, size, size):
            raise UserError(
                f"this TiTok is tied to images of {size} x {size} pixels by its learned positions, got shape "
                f"{list(pixels.shape)}; set the data's image_size={size}"
            )
        images = (pixels.to(self.latent_tokens.dtype) + 1.0) / 2.0
        return self._part("encoder", self.encoder)(images, self.latent_tokens)

    def posterior(self, pixels: Tensor) -> GaussianLatent:
        """Distribution of the latents of pixels [B, 3, S, S] in [-1, 1] (bottleneck gaussian).

        Raises:
            UserError: with another bottleneck.
        """
        if not isinstance(self.quantize, GaussianBottleneck):
            raise UserError("this TiTok has a codebook; only bottleneck=gaussian has a posterior")
        return self.quantize(self.latents(pixels))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] [B, 3, S, S] to ids int64 [B, K].

        Raises:
            UserError: for images of another size, or with continuous latents.
        """
        quantizer, latents = self._vq(), self.latents(pixels)
        with torch.autocast(latents.device.type, enabled=False):
            ids = quantizer.nearest(quantizer.rows(latents), quantizer.codebook)
        return ids.view(len(pixels), -1)

    def decode(self, ids: Tensor, text: Tensor | None = None) -> Tensor:
        """Ids to pixels.

        Args:
            ids: int64 [B, K]; continuous latents float [B, K, C] with bottleneck gaussian.
            text: features [B, text_length, text_dim] for a text-aware TiTok, which without them sees zeros.

        Returns:
            float32 [B, 3, S, S] in about [-1, 1], not clamped.

        Raises:
            UserError: for another number of ids, unfitting text, or a first stage without a pixel decoder.
        """
        if self.latent_channels and ids.is_floating_point():
            if ids.shape[1:] != (self.num_tokens, self.latent_channels):
                raise UserError(
                    f"this TiTok decodes latents [B, {self.num_tokens}, {self.latent_channels}], got shape "
                    f"{list(ids.shape)}"
                )
            return self.decode_latents(ids.transpose(1, 2).unsqueeze(2), text)
        if ids.dim() != 2 or ids.shape[1] != self.num_tokens:
            raise UserError(f"this TiTok decodes exactly {self.num_tokens} ids per image, got shape {list(ids.shape)}")
        return self.decode_latents(self._vq().lookup(ids).transpose(1, 2).unsqueeze(2), text)

    def decode_samples(self, ids: Tensor, sample_index: Tensor, seed: int, text: Tensor | None = None) -> Tensor:
        """Decode without noise; arguments and errors as in :meth:`decode`."""
        return self.decode(ids, text)

    def decode_latents(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        """Latents [B, C, 1, K] to float32 pixels; text, result and errors as in `decode`."""
        hidden = self._painted(latents, text)
        if self.head == "pixel":
            images = self.decoder.conv_out(hidden)
        elif self.pixel_decoder is None:
            raise UserError(
                "this TiTok predicts proxy codes and holds no pixel decoder (first stage of the original); train it "
                "with task=titok_stage1, which adds its teacher's, or import it with --proxy <MaskGIT-VQGAN file>"
            )
        else:
            codes = self.proxy_vectors(hidden).to(self.latent_tokens.dtype)
            images = self.pixel_decoder.finish(self._part("pixels", self.pixel_decoder.features)(codes))
        return images.float() * 2.0 - 1.0

    def _painted(self, latents: Tensor, text: Tensor | None) -> Tensor:
        """Output of the ViT decoder before its last convolution, or its proxy logits."""
        if text is not None and text.shape[1:] != (self.text_length, self.text_dim):
            raise UserError(
                f"text features of shape {list(text.shape)} do not fit tokenizer.text_length={self.text_length} and "
                f"text_dim={self.text_dim}"
            )
        return self._part("decoder", self.decoder.features)(latents.to(self.latent_tokens.dtype), text)

    def proxy_vectors(self, logits: Tensor) -> Tensor:
        """Input of the pixel decoder, float32 [B, C, g, g], for proxy logits [B, V, g, g] (head proxy)."""
        assert self.pixel_quantize is not None
        with torch.autocast(logits.device.type, enabled=False):
            codes = self.pixel_quantize.embedding.weight.float()
            if self.proxy_mix == "hard":
                return F.embedding(logits.argmax(1), codes).permute(0, 3, 1, 2)
            return torch.einsum("bvhw,vc->bchw", logits.float().softmax(1), codes)

    def predict(self, pixels: Tensor) -> ProxyPrediction:
        """Predict the proxy codes of pixels [B, 3, S, S] in [-1, 1] through the bottleneck (head proxy)."""
        assert self.head == "proxy", "only head=proxy predicts proxy codes"
        quantized = self._vq()(self.latents(pixels))
        return ProxyPrediction(self._painted(quantized.latent, None), quantized.ids, quantized.losses)

    def reconstruct(self, pixels: Tensor, text: Tensor | None = None) -> Tensor:
        """Encode and decode; a Gaussian is decoded at its mean. Arguments and result as in `encode` and `decode`."""
        if isinstance(self.quantize, GaussianBottleneck):
            return self.decode_latents(self.posterior(pixels).mean, text)
        return self.decode(self.encode(pixels), text)

    def forward(self, pixels: Tensor, text: Tensor | None = None) -> TokenizerOutput:
        """Reconstruct pixels [B, 3, S, S] with gradients through the bottleneck; a Gaussian is sampled in training."""
        if isinstance(self.quantize, GaussianBottleneck):
            latent = self.posterior(pixels)
            chosen = latent.sample() if self.training else latent.mean
            ids = torch.zeros(len(pixels), 0, dtype=torch.int64, device=pixels.device)
            return TokenizerOutput(self.decode_latents(chosen, text), ids, self.quantize.losses(latent))
        quantized = self.quantize(self.latents(pixels))
        return TokenizerOutput(self.decode_latents(quantized.latent, text), quantized.ids, quantized.losses)

    def statistics(self, ids: Tensor) -> dict[str, Tensor]:
        """Perplexity of `ids` and the share of the codebook used in the recent window of training tokens."""
        return super().statistics(ids) | {"codebook_usage": self._vq().usage()}


def _check_names(**options: str) -> None:
    known = {
        "bottleneck": ("vq", "clustering_vq", "gaussian"),
        "latent_layout": LAYOUTS,
        "head": ("pixel", "proxy"),
        "proxy_mix": ("soft", "hard"),
    }
    for key, name in options.items():
        if name not in known[key]:
            raise UserError(f"tokenizer.{key}={name} is unknown; choose one of {', '.join(known[key])}")


def _check_patches(image_size: int, *patch_sizes: int) -> None:
    for size in patch_sizes:
        if size < 1 or image_size < 1 or image_size % size:
            raise UserError(f"tokenizer.image_size={image_size} must be a multiple of the patch size {size}")


def _check_head(head: str, proxy_codes: int | None, decoder: PixelDecoder | None, patch_size: int) -> None:
    if head == "pixel":
        if proxy_codes is not None or decoder is not None:
            raise UserError("tokenizer.proxy_codebook_size and pixel_decoder have no effect with head=pixel")
        return
    if not proxy_codes or proxy_codes < 1:
        raise UserError("tokenizer.head=proxy needs tokenizer.proxy_codebook_size, the number of its teacher's codes")
    if decoder is not None and decoder.stride != patch_size:
        raise UserError(
            f"the pixel decoder makes {decoder.stride} pixels of a proxy code and the TiTok decoder one code per patch "
            f"of {patch_size}; make tokenizer.patch_size={decoder.stride}"
        )


def _sizes(key: str, sizes: Mapping[str, int]) -> dict[str, int]:
    if set(sizes) != {"width", "layers", "heads"} or min(sizes.values()) < 1:
        raise UserError(f"tokenizer.{key} must give width, layers and heads, all at least 1, not {dict(sizes)}")
    return dict(sizes)
