"""Discriminators and adversarial losses of VQ-GAN training (Esser et al., 2021; LlamaGen section 2.4)."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import UserError

# The constants the original's swapped arguments leave behind: softplus(1) = log(1 + e) and softplus(0) = log 2.
_SOFTPLUS_ONE = math.log1p(math.e)
_SOFTPLUS_ZERO = math.log(2.0)


class PatchGAN(nn.Module):
    """Convolutional discriminator that judges overlapping patches (pix2pix, Isola et al., 2017).

    Args:
        in_channels: channels of the images.
        base_channels: channels of the first layer, doubled per layer up to eight times.
        num_layers: normalised layers; all but the last halve the resolution, as the first layer does.
        norm: ``batch`` as published, or ``group`` (independent of the batch and of the number of processes).

    Raises:
        UserError: for an unknown norm or sizes below 1.
    """

    def __init__(self, *, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3, norm: str = "batch"):
        super().__init__()
        norms: dict[str, Callable[[int], nn.Module]] = {
            "batch": nn.BatchNorm2d,
            "group": lambda width: nn.GroupNorm(math.gcd(32, width), width),
        }
        if norm not in norms:
            raise UserError(f"discriminator.norm={norm} is unknown; choose one of {', '.join(norms)}")
        if min(in_channels, base_channels, num_layers) < 1:
            raise UserError("discriminator.in_channels, base_channels and num_layers must be at least 1")
        widths = [base_channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index in range(num_layers):
            stride = 2 if index < num_layers - 1 else 1
            # Batch norm removes the mean, so a bias before it would have no effect.
            conv = nn.Conv2d(widths[index], widths[index + 1], 4, stride=stride, padding=1, bias=norm != "batch")
            layers += [conv, norms[norm](widths[index + 1]), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.min_size = 3 * 2**num_layers
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] [B, C, H, W] to a map of logits [B, 1, h, w].

        Raises:
            UserError: if the images are too small for the number of layers.
        """
        if min(pixels.shape[2:]) < self.min_size:
            raise UserError(
                f"images of {pixels.shape[2]} x {pixels.shape[3]} pixels are too small for this PatchGAN (at least "
                f"{self.min_size}); lower discriminator.num_layers"
            )
        return self.main(pixels)


class Blur(nn.Module):
    """Binomial 3x3 filter with reflected borders, applied to each channel."""

    def __init__(self):
        super().__init__()
        self.f: Tensor
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to the same shape."""
        kernel = self.f[:, None] * self.f
        kernel = (kernel / kernel.abs().sum()).to(x.dtype).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=x.shape[1])


class StyleBlock(nn.Module):
    """Residual block of the StyleGAN-type discriminator."""

    def __init__(self, in_channels: int, out_channels: int, *, downsample: bool = True):
        super().__init__()
        self.conv_res = nn.Conv2d(in_channels, out_channels, 1, stride=2 if downsample else 1)
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.downsample = (
            nn.Sequential(Blur(), nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)) if downsample else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, in, H, W] to [B, out, H / 2, W / 2], or to [B, out, H, W] without downsampling."""
        branch = self.net(x)
        if self.downsample is not None:
            branch = self.downsample(branch)
        return (branch + self.conv_res(x)) / math.sqrt(2.0)


class StyleGANDiscriminator(nn.Module):
    """Discriminator in the manner of StyleGAN2, one logit per square image.

    Args:
        image_size: side of the images, a power of two from 8 to 1024.
        max_channels: cap on the published widths (512 at 32 pixels and below).

    Raises:
        UserError: for another image size or a cap below 1.
    """

    def __init__(self, *, image_size: int, max_channels: int = 512):
        super().__init__()
        if image_size not in (8, 16, 32, 64, 128, 256, 512, 1024):
            raise UserError(f"discriminator.image_size={image_size} must be a power of two from 8 to 1024")
        if max_channels < 1:
            raise UserError(f"discriminator.max_channels={max_channels} must be at least 1")
        self.image_size = image_size
        sizes = [image_size // 2**i for i in range(int(math.log2(image_size)) - 1)]
        widths = [min(512, 16384 // size, max_channels) for size in sizes]
        blocks: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1), nn.LeakyReLU(0.2)]
        blocks += [StyleBlock(a, b) for a, b in pairwise(widths)]
        self.blocks = nn.Sequential(*blocks)
        self.final_conv = nn.Sequential(nn.Conv2d(widths[-1], widths[-1], 3, padding=1), nn.LeakyReLU(0.2))
        self.final_linear = nn.Sequential(
            nn.Linear(widths[-1] * 16, widths[-1]), nn.LeakyReLU(0.2), nn.Linear(widths[-1], 1)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] [B, 3, S, S] to logits [B, 1].

        Raises:
            UserError: if the images are not `image_size` square.
        """
        if pixels.shape[2:] != (self.image_size, self.image_size):
            raise UserError(
                f"discriminator.image_size={self.image_size} but the images are {pixels.shape[2]} x {pixels.shape[3]}"
            )
        return self.final_linear(self.final_conv(self.blocks(pixels)).flatten(1))


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Half the sum of mean relu(1 - real) and mean relu(1 + fake), for logits of any shape."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def logistic_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Half the sum of the two binary cross-entropies: taming's vanilla, and the non-saturating game's as well."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """Minus the mean logit."""
    return -fake.mean()


def non_saturating_generator(fake: Tensor) -> Tensor:
    """Cross-entropy of fakes against the label real (Goodfellow et al., 2014)."""
    return F.softplus(-fake).mean()


def reference_non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """What LlamaGen computes under that name: logits and targets are swapped, so fakes get no gradient."""
    return 0.5 * (_SOFTPLUS_ONE - real.mean() + _SOFTPLUS_ZERO + 0.0 * fake.mean())


def reference_non_saturating_generator(fake: Tensor) -> Tensor:
    """What LlamaGen computes under that name, with logits and targets swapped."""
    return _SOFTPLUS_ONE - fake.mean()


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_discriminator,
    "vanilla": logistic_discriminator,
    "non-saturating": logistic_discriminator,
    "non-saturating-reference": reference_non_saturating_discriminator,
}
GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": hinge_generator,
    "non-saturating": non_saturating_generator,
    "non-saturating-reference": reference_non_saturating_generator,
}


def adaptive_weight(reference: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of gradient norms at the decoder's last layer (Esser et al., 2021, equation 7).

    Args:
        reference: scalar reconstruction + perceptual loss.
        adversarial: scalar adversarial loss of the generator.
        last_layer: parameter in both graphs.

    Returns:
        Detached scalar in [0, 1e4].
    """
    (target,) = torch.autograd.grad(reference, last_layer, retain_graph=True)
    (gradient,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (target.norm() / (gradient.norm() + 1e-4)).clamp(0.0, 1e4).detach()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Build graphs through a module that leave no gradient in its parameters."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
