"""What the trainings of tokenizers share: manual optimisation, frozen parts, and how the codebook is used."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor

from vgen.tokenizers.base import Autoencoder
from vgen.training.module import MakeOptimizer, TrainingModule
from vgen.training.optim import freeze_others


class CodebookModule(TrainingModule):
    """Base of the modules that train a tokenizer or another autoencoder.

    Args:
        tokenizer: network to train; one without codes has no code use to report.
        optimizer: function of (named parameters, names of matrices).
        accumulate: batches per optimizer step.
        compile_network: compile the tokenizer's training pass.
        train_only: beginnings of the names of the parameters that are trained; None = all.
        kind: of the release, ``tokenizer`` or ``vae``.
        shared: arguments of :class:`vgen.training.module.TrainingModule` other than the network.

    Raises:
        UserError: if an entry of train_only is no beginning of any name.
    """

    def __init__(
        self,
        *,
        tokenizer: Autoencoder,
        optimizer: MakeOptimizer,
        accumulate: int,
        compile_network: bool,
        train_only: Sequence[str] | None = None,
        kind: str = "tokenizer",
        **shared: Any,
    ) -> None:
        if train_only is not None:
            freeze_others(tokenizer, tuple(train_only))
        super().__init__(network=tokenizer, **shared)
        self.task = kind
        self.automatic_optimization = False
        self.accumulate = accumulate
        self._make_optimizer = optimizer
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
        """The tokenizer's optimizer."""
        return [self.make_optimizer(self._make_optimizer, "network.", self.matrices())]

    def completes_step(self) -> bool:
        """Whether the batch in hand is the last one of an optimizer step."""
        return (self.trainer.fit_loop.epoch_loop.total_batch_idx + 1) % self.accumulate == 0

    def on_validation_epoch_end(self) -> None:
        """Add code use over the whole validation set."""
        self._validation_codes = self._validation_codes.to(self.device)
        for name, value in self._code_use(self._validation_codes).items():
            self.log(f"val/{name}", value, logger=False, rank_zero_only=False)
        self._validation_codes.zero_()
        super().on_validation_epoch_end()

    def end_interval(self) -> dict[str, float]:
        """Means of the interval and its code use."""
        self._codes = self._codes.to(self.device)
        report = super().end_interval() | self._code_use(self._codes)
        self._codes.zero_()
        return report

    def step_network(self) -> None:
        """Clip, step the tokenizer's optimizer, and fold the new weights into the average."""
        optimizer = self.optimizers()
        if isinstance(optimizer, list):
            optimizer = optimizer[0]
        assert isinstance(optimizer, LightningOptimizer)
        self.record(grad_norm=self.clip_gradients_of(self.network.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update()

    def reconstruct(self, pixels: Tensor) -> Tensor:
        """Reconstructions for the picture grid, of the shape of the pixels."""
        return self.tokenizer.reconstruct(pixels)

    def count_codes(self, ids: Tensor) -> None:
        """Count the codes of a training or validation batch, int64 of any shape."""
        if self.training:
            counts = self._codes = self._codes.to(self.device)
        else:
            counts = self._validation_codes = self._validation_codes.to(self.device)
        flat = ids.flatten()
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype))

    def _code_use(self, counts: Tensor) -> dict[str, float]:
        """Share of codes used and perplexity (effective number of codes) over all processes; none without codes."""
        if not counts.numel():
            return {}
        counts = self.trainer.strategy.reduce(counts.clone(), reduce_op="sum")
        share = counts / counts.sum().clamp(min=1)
        perplexity = torch.special.entr(share).sum().exp()
        return {"codebook_usage": (counts > 0).double().mean().item(), "perplexity": perplexity.item()}
