"""The training losses of a VQ-GAN, combined as in LlamaGen (arXiv 2406.06525) or as in TiTok (arXiv 2406.07550)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.losses.adversarial import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, adaptive_weight, frozen
from vgen.losses.blur_discriminator import LeCam
from vgen.losses.classifier_distance import ClassifierDistance, load_convnext
from vgen.losses.perceptual import LPIPS, load_lpips
from vgen.pixels import frames_of

RECONSTRUCTION_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
PERCEPTUAL_LOSSES = ("lpips", "convnext", "lpips+convnext", "none")
PIXEL_RANGES = {"signed": 1.0, "unit": 0.5}
"""Scale of the pixels inside the reconstruction loss: [-1, 1] or [0, 1]."""


class VQLoss:
    """Generator and discriminator objectives of tokenizer training.

    Not a module on purpose: the frozen perceptual networks must enter neither the training state nor the optimizers.
    They follow the images to their device.

    Args:
        reconstruction: ``l1`` or ``l2``, mean over all elements.
        reconstruction_weight: its weight.
        reconstruction_range: ``signed`` compares pixels in [-1, 1] (LlamaGen), ``unit`` in [0, 1] (TiTok), where l2 is
            a quarter as large.
        perceptual: ``lpips``, ``convnext`` (logits of ConvNeXt-S), ``lpips+convnext`` or ``none``.
        perceptual_weight: weight of the perceptual loss; 0 also switches it off.
        perceptual_weights: folder or file with the weights, see :func:`vgen.losses.perceptual.load_lpips` and
            :func:`vgen.losses.classifier_distance.load_convnext`.
        convnext_weight: of ConvNeXt beside LPIPS in ``lpips+convnext``, (lpips + w convnext) / (1 + w).
        discriminator_loss: ``hinge``, ``vanilla``, ``non-saturating`` or ``non-saturating-reference`` (the original's
            version with swapped arguments, for parity only).
        generator_loss: ``hinge``, ``non-saturating`` or ``non-saturating-reference``.
        adversarial_weight: weight of both adversarial terms once active; 0 trains without a discriminator.
        discriminator_weight: weight of the discriminator's own objective; None = adversarial_weight (LlamaGen).
        adversarial_start: first global step (counted from 1) at which they are active.
        adaptive: scale the generator's term by the ratio of gradient norms at the decoder's last layer.
        lecam_weight: weight of the LeCam regularisation of the discriminator; 0 = none.
        quantizer_weight: weight of the sum of the quantizer's terms.

    Attributes:
        lecam: its running means, or None; state of the training, to be saved by the training module.

    Raises:
        UserError: for unknown names, negative weights, or missing weights of a perceptual network.
    """

    def __init__(
        self,
        *,
        reconstruction: str = "l2",
        reconstruction_weight: float = 1.0,
        reconstruction_range: str = "signed",
        perceptual: str = "lpips",
        perceptual_weight: float = 1.0,
        perceptual_weights: str | Path | None = None,
        convnext_weight: float = 0.1,
        discriminator_loss: str = "hinge",
        generator_loss: str = "hinge",
        adversarial_weight: float = 0.5,
        discriminator_weight: float | None = None,
        adversarial_start: int = 20000,
        adaptive: bool = False,
        lecam_weight: float = 0.0,
        quantizer_weight: float = 1.0,
    ):
        for key, name, known in (
            ("reconstruction", reconstruction, RECONSTRUCTION_LOSSES),
            ("reconstruction_range", reconstruction_range, PIXEL_RANGES),
            ("perceptual", perceptual, PERCEPTUAL_LOSSES),
            ("discriminator_loss", discriminator_loss, DISCRIMINATOR_LOSSES),
            ("generator_loss", generator_loss, GENERATOR_LOSSES),
        ):
            if name not in known:
                raise UserError(f"loss.{key}={name} is unknown; choose one of {', '.join(known)}")
        for key, number in (
            ("reconstruction_weight", reconstruction_weight),
            ("perceptual_weight", perceptual_weight),
            ("adversarial_weight", adversarial_weight),
            ("adversarial_start", adversarial_start),
            ("convnext_weight", convnext_weight),
            ("discriminator_weight", discriminator_weight or 0.0),
            ("lecam_weight", lecam_weight),
            ("quantizer_weight", quantizer_weight),
        ):
            if number < 0:
                raise UserError(f"loss.{key}={number} must not be negative")
        self.reconstruction = RECONSTRUCTION_LOSSES[reconstruction]
        self.reconstruction_weight = reconstruction_weight
        self.pixel_scale = PIXEL_RANGES[reconstruction_range]
        self.perceptual_weight = perceptual_weight
        self.convnext_weight = convnext_weight
        parts = perceptual.split("+") if perceptual_weight > 0 else []
        self.perceptual: LPIPS | None = load_lpips(perceptual_weights) if "lpips" in parts else None
        self.convnext: ClassifierDistance | None = load_convnext(perceptual_weights) if "convnext" in parts else None
        self.discriminator_objective = DISCRIMINATOR_LOSSES[discriminator_loss]
        self.generator_objective = GENERATOR_LOSSES[generator_loss]
        self.adversarial_weight = adversarial_weight
        self.discriminator_weight = adversarial_weight if discriminator_weight is None else discriminator_weight
        self.lecam_weight = lecam_weight
        self.lecam = LeCam() if lecam_weight > 0 and adversarial_weight > 0 else None
        self.quantizer_weight = quantizer_weight
        self.adversarial_start = adversarial_start
        self.adaptive = adaptive

    @property
    def needs_discriminator(self) -> bool:
        """Whether a discriminator takes part in this training at all."""
        return self.adversarial_weight > 0

    def active(self, step: int) -> bool:
        """Whether the adversarial terms count at global step `step` (from 1); before, the discriminator may rest."""
        return self.needs_discriminator and step >= self.adversarial_start

    def judges(self, step: int) -> bool:
        """Whether the discriminator learns at global step `step` (from 1)."""
        return self.active(step)

    def generator_loss(
        self,
        pixels: Tensor,
        reconstruction: Tensor,
        quantizer_losses: dict[str, Tensor],
        *,
        step: int,
        discriminator: nn.Module | None = None,
        last_layer: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective of the tokenizer.

        Args:
            pixels: originals in [-1, 1], [B, 3, H, W] or [B, 3, T, H, W].
            reconstruction: the same shape, with gradient.
            quantizer_losses: weighted scalars to add, as in `TokenizerOutput.losses`.
            step: global step, counted from 1.
            discriminator: judged by it once active; its parameters get no gradient from here.
            last_layer: the decoder's last weight, needed when adaptive.

        Returns:
            The total, and detached scalars to log: ``reconstruction``, ``perceptual``, ``generator``, the quantizer's
            terms and, when adaptive, ``adaptive_weight``; raw values without the weights of this class.
        """
        rec = self.reconstruction(self.pixel_scale * reconstruction.float(), self.pixel_scale * pixels.float())
        base = self.reconstruction_weight * rec
        logs = {"reconstruction": rec}
        if self.perceptual is not None or self.convnext is not None:
            logs["perceptual"] = self._perceptual(pixels, reconstruction)
            base = base + self.perceptual_weight * logs["perceptual"]
        total = base
        if self.active(step):
            assert discriminator is not None, "an active adversarial loss needs a discriminator"
            with frozen(discriminator):
                logs["generator"] = self.generator_objective(discriminator(reconstruction).float())
            weight: Tensor | float = self.adversarial_weight
            if self.adaptive and torch.is_grad_enabled():
                assert last_layer is not None, "the adaptive weight needs the decoder's last layer"
                logs["adaptive_weight"] = adaptive_weight(base, logs["generator"], last_layer)
                weight = weight * logs["adaptive_weight"]
            total = total + weight * logs["generator"]
        for name, value in quantizer_losses.items():
            total = total + self.quantizer_weight * value
            logs[name] = value
        return total, {name: value.detach() for name, value in logs.items()} | {"total": total.detach()}

    def discriminator_loss(
        self, pixels: Tensor, reconstruction: Tensor, *, step: int, discriminator: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective of the discriminator, zero (with zero gradients) before `adversarial_start`.

        Args:
            pixels: originals in [-1, 1], [B, 3, H, W] or [B, 3, T, H, W].
            reconstruction: the same shape; gradients stop here.
            step: global step, counted from 1.
            discriminator: called once on real and once on reconstructed images.

        Returns:
            The total, and detached scalars to log: ``discriminator`` (raw), mean ``logits_real`` and ``logits_fake``
            and, where it takes part, ``lecam`` (raw).
        """
        real = discriminator(pixels.detach()).float()
        fake = discriminator(reconstruction.detach()).float()
        raw = self.discriminator_objective(real, fake)
        total = raw * (self.discriminator_weight if self.active(step) else 0.0)
        logs = {"discriminator": raw, "logits_real": real.mean(), "logits_fake": fake.mean()}
        if self.lecam is not None and self.active(step):
            logs["lecam"] = self.lecam(real, fake)
            total = total + self.lecam_weight * logs["lecam"]
        return total, {name: value.detach() for name, value in logs.items()}

    def _perceptual(self, pixels: Tensor, reconstruction: Tensor) -> Tensor:
        """Mean over the images of the perceptual distance; of both distances their weighted mean."""
        pixels, reconstruction = frames_of(pixels), frames_of(reconstruction)
        terms: list[tuple[float, Tensor]] = []
        if self.perceptual is not None:
            terms.append((1.0, self.perceptual.to(pixels.device)(pixels, reconstruction).mean()))
        if self.convnext is not None:
            weight = self.convnext_weight if terms else 1.0
            terms.append((weight, self.convnext.to(pixels.device)(pixels, reconstruction)))
        weighted = torch.stack([weight * term for weight, term in terms])
        return weighted.sum() / sum(weight for weight, _ in terms)
