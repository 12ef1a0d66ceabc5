"""The convolutional KL autoencoder of latent diffusion (Rombach et al., 2022), with the module names of diffusers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.tokenizers.base import Autoencoder, TokenizerOutput, check_pixels
from vgen.tokenizers.convnet import Downsample, Upsample
from vgen.tokenizers.norm_swish import group_norm


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents, before scaling.

    Attributes:
        mean: float32 [B, C, h, w].
        logvar: logarithm of the variance, same shape, in [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Latents for standard normal noise of the same shape."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self, *, mean_scale: float = 1.0) -> Tensor:
        """Divergence from the standard normal in nats, summed over each latent map, [B].

        Args:
            mean_scale: factor on the mean alone. FlexTok's wrapper reports the figure after it has scaled the mean, not
                the variance, by the scaling factor; for parity only.
        """
        terms = (self.mean * mean_scale).square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


class _ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.has_shortcut = in_channels != out_channels
        if self.has_shortcut:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return branch + (self.conv_shortcut(x) if self.has_shortcut else x)


class _Attention(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = group_norm(channels, groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        rows = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)
        attended = F.scaled_dot_product_attention(self.to_q(rows), self.to_k(rows), self.to_v(rows))
        return x + self.to_out[0](attended).squeeze(1).transpose(1, 2).reshape(x.shape)


class _Middle(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([_Attention(channels, groups)])
        self.resnets = nn.ModuleList(_ResBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class _Level(nn.Module):
    """Residual blocks of one resolution, then a change of resolution."""

    def __init__(
        self, in_channels: int, channels: int, *, blocks: int, groups: int, down: bool = False, up: bool = False
    ):
        super().__init__()
        widths = [in_channels] + [channels] * blocks
        self.resnets = nn.ModuleList(_ResBlock(a, b, groups) for a, b in pairwise(widths))
        if down:
            self.downsamplers = nn.ModuleList([Downsample(channels)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(channels)])
        self.resample = "downsamplers" if down else "upsamplers" if up else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x if self.resample is None else self.get_submodule(self.resample + ".0")(x)


class _Encoder(nn.Module):
    def __init__(self, channels: Sequence[int], blocks: int, latent_channels: int, groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        widths = [channels[0], *channels]
        self.down_blocks = nn.ModuleList(
            _Level(a, b, blocks=blocks, groups=groups, down=index < len(channels) - 1)
            for index, (a, b) in enumerate(pairwise(widths))
        )
        self.mid_block = _Middle(channels[-1], groups)
        self.conv_norm_out = group_norm(channels[-1], groups)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nn.Module):
    def __init__(self, channels: Sequence[int], blocks: int, latent_channels: int, groups: int):
        super().__init__()
        top_down = list(reversed(channels))
        self.conv_in = nn.Conv2d(latent_channels, top_down[0], 3, padding=1)
        self.mid_block = _Middle(top_down[0], groups)
        self.up_blocks = nn.ModuleList(
            _Level(a, b, blocks=blocks + 1, groups=groups, up=index < len(top_down) - 1)
            for index, (a, b) in enumerate(pairwise([top_down[0], *top_down]))
        )
        self.conv_norm_out = group_norm(top_down[-1], groups)
        self.conv_out = nn.Conv2d(top_down[-1], 3, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        """What the last convolution sees."""
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return F.silu(self.conv_norm_out(x))


class AutoencoderKL(Autoencoder):
    """Pixels to a small continuous latent map and back.

    Images of any height and width divisible by the stride are accepted; `image_size` is that of the usual images.
    Always float32: autocast is switched off inside, except in :meth:`forward`, which is for training.

    Args:
        image_size: side in pixels.
        latent_channels: channels C of the latents.
        block_channels: channels of every resolution, highest resolution first; each further entry halves the
            resolution, so the stride is 2 ** (entries - 1).
        layers_per_block: residual blocks per resolution of the encoder (the decoder has one more).
        norm_groups: groups of the group normalisation (the greatest common divisor with the channels is used).
        scaling_factor: latents are multiplied by it after encoding and divided before decoding.
        kl_weight: weight of the KL term in training, per pixel value (as in latent diffusion: 1e-6).

    Raises:
        UserError: for sizes that do not fit.
    """

    def __init__(
        self,
        *,
        image_size: int,
        latent_channels: int = 4,
        block_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_groups: int = 32,
        scaling_factor: float = 1.0,
        kl_weight: float = 1e-6,
    ) -> None:
        if not block_channels or min(latent_channels, layers_per_block, norm_groups, *block_channels) < 1:
            raise UserError(
                f"AutoencoderKL: latent_channels={latent_channels}, block_channels={list(block_channels)}, "
                f"layers_per_block={layers_per_block} and norm_groups={norm_groups} must be positive"
            )
        if not scaling_factor > 0 or kl_weight < 0:
            raise UserError(
                f"AutoencoderKL: scaling_factor={scaling_factor} must be positive, kl_weight={kl_weight} not negative"
            )
        stride = 2 ** (len(block_channels) - 1)
        if image_size < 1 or image_size % stride:
            raise UserError(
                f"AutoencoderKL: image_size={image_size} must be a multiple of the stride {stride} that "
                f"{len(block_channels)} block_channels give"
            )
        super().__init__(image_size=image_size)
        self.stride, self.latent_channels = stride, latent_channels
        self.scaling_factor, self.kl_weight = scaling_factor, kl_weight
        self.encoder = _Encoder(block_channels, layers_per_block, latent_channels, norm_groups)
        self.decoder = _Decoder(block_channels, layers_per_block, latent_channels, norm_groups)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self._compiled: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's last convolution."""
        return self.decoder.get_parameter("conv_out.weight")

    def compile_parts(self) -> None:
        """Compile the convolutional networks for training, the last layer excepted; names of parameters stay."""
        self._compiled = (torch.compile(self.encoder.forward), torch.compile(self.decoder.features))

    def _trains(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def posterior(self, pixels: Tensor) -> Posterior:
        """Distribution of the unscaled latents of pixels in [-1, 1] [B, 3, H, W].

        Raises:
            UserError: if the images do not have 3 channels or a side is not divisible by the stride.
        """
        check_pixels(pixels, self.stride)
        encode = self._compiled[0] if self._compiled and self._trains() else self.encoder
        mean, logvar = self.quant_conv(encode(pixels.to(self.last_layer.dtype))).float().chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels to scaled latents float32 [B, C, h, w].

        Args:
            pixels: in [-1, 1], [B, 3, H, W].
            noise: standard normal [B, C, h, w] to sample the posterior with; None = its mean.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            posterior = self.posterior(pixels)
            return (posterior.mean if noise is None else posterior.sample(noise)) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] to float32 pixels [B, 3, h * stride, w * stride], not clamped."""
        with torch.autocast(latents.device.type, enabled=False):
            return self._pixels(latents.float() / self.scaling_factor)

    def _pixels(self, unscaled: Tensor) -> Tensor:
        features = self._compiled[1] if self._compiled and self._trains() else self.decoder.features
        inner = self.post_quant_conv(unscaled.to(self.last_layer.dtype))
        return self.decoder.conv_out(features(inner)).float()

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        """Reconstruct pixels [B, 3, H, W]: from a sample of the posterior in training mode, else from its mean.

        The loss ``kl`` is the divergence per pixel value times its weight; there are no ids.
        """
        posterior = self.posterior(pixels)
        mean = posterior.mean
        latents = posterior.sample(torch.randn_like(mean)) if self.training else mean
        kl = self.kl_weight * posterior.kl().mean() / pixels[0].numel()
        ids = torch.empty(len(pixels), 0, dtype=torch.int64, device=pixels.device)
        return TokenizerOutput(self._pixels(latents), ids, {"kl": kl})
