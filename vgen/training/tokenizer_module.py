"""Training of a tokenizer against a discriminator."""

from typing import Any

import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from vgen.evaluation.pixel_metrics import psnr
from vgen.losses.vq import VQLoss
from vgen.pixels import frames_of, to_uint8
from vgen.tokenizers.base import Autoencoder
from vgen.training.module import MakeOptimizer, TrainingModule


class TokenizerModule(TrainingModule):
    """Alternating training of a tokenizer and its discriminator.

    Optimisation is manual, because two losses are minimised per batch: a tokenizer step, then a discriminator step that
    reuses the reconstruction computed before the tokenizer's update (LlamaGen). Only the tokenizer's steps count.

    Args:
        tokenizer: network to train; a continuous autoencoder has no code use to report.
        discriminator: network that tells reconstructions from originals, or None.
        loss: the objectives.
        optimizer: function of (named parameters, names of matrices).
        discriminator_optimizer: the same for the discriminator.
        accumulate: batches per optimizer step.
        compile_network: compile the tokenizer's training pass.
        kind: of the release, ``tokenizer`` or ``vae``.
        shared: arguments of :class:`vgen.training.module.TrainingModule` other than the network.
    """

    def __init__(
        self,
        *,
        tokenizer: Autoencoder,
        discriminator: nn.Module | None,
        loss: VQLoss,
        optimizer: MakeOptimizer,
        discriminator_optimizer: MakeOptimizer | None,
        accumulate: int,
        compile_network: bool,
        kind: str = "tokenizer",
        **shared: Any,
    ) -> None:
        super().__init__(network=tokenizer, **shared)
        self.task = kind
        self.automatic_optimization = False
        self.discriminator = discriminator
        self.loss = loss
        self.accumulate = accumulate
        self._make_optimizer = optimizer
        self._make_discriminator_optimizer = discriminator_optimizer
        self._matrices = self.matrices()
        if compile_network:
            tokenizer.compile_parts()
        self._codes = torch.zeros(tokenizer.codebook_size, dtype=torch.float64)
        self._validation_codes = torch.zeros(tokenizer.codebook_size, dtype=torch.float64)

    @property
    def tokenizer(self) -> Autoencoder:
        """The network, as a tokenizer."""
        assert isinstance(self.network, Autoencoder)
        return self.network

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The tokenizer's optimizer and, where there is one, the discriminator's."""
        optimizers = [self.make_optimizer(self._make_optimizer, "network.", self._matrices)]
        if self.discriminator is not None:
            assert self._make_discriminator_optimizer is not None
            make = self._make_discriminator_optimizer
            optimizers.append(self.make_optimizer(make, "discriminator.", self._matrices))
        return optimizers

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One tokenizer and one discriminator pass; optimizers step after ``accumulate`` batches."""
        pixels = batch["pixels"]
        last = (self.trainer.fit_loop.epoch_loop.total_batch_idx + 1) % self.accumulate == 0
        # Asked before the tokenizer's step, which advances the counter.
        step = self.trainer.global_step + 1
        self.tokenizer.training_progress = step / self.trainer.max_steps
        output = self.network(pixels)
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
        self._count_codes(self._codes_on_device(), output.ids)
        if last:
            self._step_network()
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
        output = self.network(pixels)
        _, logs = self.loss.generator_loss(pixels, output.reconstruction, output.losses, step=0)
        quality = psnr(to_uint8(frames_of(output.reconstruction)), to_uint8(frames_of(pixels))).mean()
        self.sum_validation(len(pixels), loss=logs.pop("total"), psnr=quality, **logs)
        self._validation_codes = self._validation_codes.to(self.device)
        self._count_codes(self._validation_codes, output.ids)

    def reconstruct(self, pixels: Tensor) -> Tensor:
        """Reconstructions [B, 3, H, W] for the picture grid."""
        return self.tokenizer.decode(self.tokenizer.encode(pixels))

    def on_validation_epoch_end(self) -> None:
        """Add code use over the whole validation set."""
        for name, value in self._code_use(self._validation_codes).items():
            self.log(f"val/{name}", value, logger=False, rank_zero_only=False)
        self._validation_codes.zero_()
        super().on_validation_epoch_end()

    def end_interval(self) -> dict[str, float]:
        """Means of the interval and its code use."""
        report = super().end_interval() | self._code_use(self._codes_on_device())
        self._codes.zero_()
        return report

    def _step_network(self) -> None:
        optimizer = self.optimizers()
        if isinstance(optimizer, list):
            optimizer = optimizer[0]
        assert isinstance(optimizer, LightningOptimizer)
        self.record(grad_norm=self.clip_gradients_of(self.network.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update()

    def _step_discriminator(self, discriminator: nn.Module) -> None:
        # The plain optimizer, because every step of a Lightning optimizer counts towards trainer.max_steps.
        optimizer = self.trainer.optimizers[1]
        self.record(discriminator_grad_norm=self.clip_gradients_of(discriminator.parameters()))
        optimizer.step()
        optimizer.zero_grad()

    def _codes_on_device(self) -> Tensor:
        self._codes = self._codes.to(self.device)
        return self._codes

    @staticmethod
    def _count_codes(counts: Tensor, ids: Tensor) -> None:
        flat = ids.flatten()
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype))

    def _code_use(self, counts: Tensor) -> dict[str, float]:
        """Share of codes used and perplexity (effective number of codes) over all processes."""
        if not self.tokenizer.codebook_size:
            return {}
        counts = self.trainer.strategy.reduce(counts.clone(), reduce_op="sum")
        share = counts / counts.sum().clamp(min=1)
        perplexity = torch.special.entr(share).sum().exp()
        return {"codebook_usage": (counts > 0).double().mean().item(), "perplexity": perplexity.item()}
