"""The training losses of a VQ-GAN, combined as in LlamaGen (arXiv 2406.06525, section 2)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.losses.adversarial import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, adaptive_weight, frozen
from vgen.losses.perceptual import LPIPS, load_lpips
from vgen.pixels import frames_of

RECONSTRUCTION_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
PERCEPTUAL_LOSSES = ("lpips", "none")


class VQLoss:
    """Generator and discriminator objectives of tokenizer training.

    Not a module on purpose: the frozen LPIPS network must enter neither the training state nor the optimizers. It
    follows the images to their device.

    Args:
        reconstruction: ``l1`` or ``l2``, mean over all elements.
        reconstruction_weight: its weight.
        perceptual: ``lpips`` or ``none``.
        perceptual_weight: weight of the perceptual loss; 0 also switches it off.
        perceptual_weights: folder or file with the LPIPS weights, see :func:`vgen.losses.perceptual.load_lpips`.
        discriminator_loss: ``hinge``, ``vanilla``, ``non-saturating`` or ``non-saturating-reference`` (the original's
            version with swapped arguments, for parity only).
        generator_loss: ``hinge``, ``non-saturating`` or ``non-saturating-reference``.
        adversarial_weight: weight of both adversarial terms once active; 0 trains without a discriminator.
        adversarial_start: first global step (counted from 1) at which they are active.
        adaptive: scale the generator's term by the ratio of gradient norms at the decoder's last layer.

    Raises:
        UserError: for unknown names, negative weights, or missing LPIPS weights.
    """

    def __init__(
        self,
        *,
        reconstruction: str = "l2",
        reconstruction_weight: float = 1.0,
        perceptual: str = "lpips",
        perceptual_weight: float = 1.0,
        perceptual_weights: str | Path | None = None,
        discriminator_loss: str = "hinge",
        generator_loss: str = "hinge",
        adversarial_weight: float = 0.5,
        adversarial_start: int = 20000,
        adaptive: bool = False,
    ):
        for key, name, known in (
            ("reconstruction", reconstruction, RECONSTRUCTION_LOSSES),
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
        ):
            if number < 0:
                raise UserError(f"loss.{key}={number} must not be negative")
        self.reconstruction = RECONSTRUCTION_LOSSES[reconstruction]
        self.reconstruction_weight = reconstruction_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual: LPIPS | None = None
        if perceptual == "lpips" and perceptual_weight > 0:
            self.perceptual = load_lpips(perceptual_weights)
        self.discriminator_objective = DISCRIMINATOR_LOSSES[discriminator_loss]
        self.generator_objective = GENERATOR_LOSSES[generator_loss]
        self.adversarial_weight = adversarial_weight
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
        rec = self.reconstruction(reconstruction.float(), pixels.float())
        base = self.reconstruction_weight * rec
        logs = {"reconstruction": rec}
        if self.perceptual is not None:
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
            total = total + value
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
            The total, and detached scalars to log: ``discriminator`` (raw), mean ``logits_real`` and ``logits_fake``.
        """
        real = discriminator(pixels.detach()).float()
        fake = discriminator(reconstruction.detach()).float()
        raw = self.discriminator_objective(real, fake)
        total = raw * (self.adversarial_weight if self.active(step) else 0.0)
        logs = {"discriminator": raw, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return total, {name: value.detach() for name, value in logs.items()}

    def _perceptual(self, pixels: Tensor, reconstruction: Tensor) -> Tensor:
        assert self.perceptual is not None
        self.perceptual.to(pixels.device)
        return self.perceptual(frames_of(pixels), frames_of(reconstruction)).mean()
