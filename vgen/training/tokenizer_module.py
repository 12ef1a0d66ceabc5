"""Training of a tokenizer on pixels, against a discriminator."""

from typing import Any

import torch
from torch import Tensor, nn

from vgen.evaluation.pixel_metrics import psnr
from vgen.losses.vq import VQLoss
from vgen.pixels import frames_of, to_uint8
from vgen.training.codebook_module import CodebookModule
from vgen.training.module import MakeOptimizer
from vgen.training.optim import LrSchedule


class TokenizerModule(CodebookModule):
    """Alternating training of a tokenizer and its discriminator.

    Optimisation is manual, because two losses are minimised per batch: a tokenizer step, then a discriminator step that
    reuses the reconstruction computed before the tokenizer's update (LlamaGen). Only the tokenizer's steps count.

    Args:
        discriminator: network that tells reconstructions from originals, or None.
        loss: the objectives.
        discriminator_optimizer: function of (named parameters, names of matrices).
        discriminator_lr_schedule: factor of its learning rate, counted from its own first step; None = that of the
            tokenizer, in the tokenizer's steps.
        text_features: of every class, float [classes, T, E], for a text-aware tokenizer.
        shared: arguments of :class:`vgen.training.codebook_module.CodebookModule`.
    """

    def __init__(
        self,
        *,
        discriminator: nn.Module | None,
        loss: VQLoss,
        discriminator_optimizer: MakeOptimizer | None,
        discriminator_lr_schedule: LrSchedule | None = None,
        text_features: Tensor | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.discriminator = discriminator
        self.loss = loss
        # Registered, because its running means belong to the state of the training.
        self.lecam = loss.lecam
        self._make_discriminator_optimizer = discriminator_optimizer
        self.discriminator_lr_schedule = discriminator_lr_schedule
        self._text_features = text_features

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The tokenizer's optimizer and, where there is one, the discriminator's."""
        optimizers = super().configure_optimizers()
        if self.discriminator is not None:
            assert self._make_discriminator_optimizer is not None
            make = self._make_discriminator_optimizer
            optimizers.append(self.make_optimizer(make, "discriminator.", self.matrices()))
        return optimizers

    def set_learning_rates(self) -> None:
        """Set every learning rate; a discriminator with a schedule of its own counts from its own first step."""
        super().set_learning_rates()
        if self.discriminator is None or self.discriminator_lr_schedule is None:
            return
        # The loss counts steps from 1, the schedule from 0.
        step = max(0, self.trainer.global_step + 1 - max(1, self.loss.adversarial_start))
        for group in self.trainer.optimizers[1].param_groups:
            group["lr"] = self._base_lrs[1] * self.discriminator_lr_schedule.factor(step)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One tokenizer and one discriminator pass; optimizers step after ``accumulate`` batches."""
        pixels = batch["pixels"]
        last = self.completes_step()
        # Asked before the tokenizer's step, which advances the counter.
        step = self.trainer.global_step + 1
        self.tokenizer.training_progress = step / self.trainer.max_steps
        output = self.network(pixels, *self._text(batch))
        total, logs = self.loss.generator_loss(
            pixels,
            output.reconstruction,
            output.losses,
            step=step,
            discriminator=self.discriminator,
            last_layer=self.tokenizer.last_layer,
        )
        self.manual_backward(total / self.accumulate)
        self.record(loss=logs.pop("total"), **logs)
        self.count_codes(output.ids)
        if last:
            self.step_network()
        if self.discriminator is not None and self.loss.judges(step):
            total, logs = self.loss.discriminator_loss(
                pixels, output.reconstruction.detach(), step=step, discriminator=self.discriminator
            )
            self.manual_backward(total / self.accumulate)
            self.record(**logs)
            if last:
                self._step_discriminator(self.discriminator)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Reconstruction, perceptual distance, PSNR of the 8-bit pictures and code use on held-out images."""
        pixels = batch["pixels"]
        output = self.network(pixels, *self._text(batch))
        # A step before any: held-out images are not judged by the discriminator, even where it takes part from 0 on.
        _, logs = self.loss.generator_loss(pixels, output.reconstruction, output.losses, step=-1)
        quality = psnr(to_uint8(frames_of(output.reconstruction)), to_uint8(frames_of(pixels))).mean()
        self.sum_validation(len(pixels), loss=logs.pop("total"), psnr=quality, **logs)
        self.count_codes(output.ids)

    def _text(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """Text features of a batch's classes as a further argument, where the tokenizer takes any."""
        if self._text_features is None:
            return ()
        self._text_features = self._text_features.to(self.device)
        return (self._text_features[batch["label"]],)

    def _step_discriminator(self, discriminator: nn.Module) -> None:
        # The plain optimizer, because every step of a Lightning optimizer counts towards trainer.max_steps.
        optimizer = self.trainer.optimizers[1]
        self.record(discriminator_grad_norm=self.clip_gradients_of(discriminator.parameters()))
        optimizer.step()
        optimizer.zero_grad()
