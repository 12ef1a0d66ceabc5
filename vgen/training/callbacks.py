"""Callbacks: measurements and their log, one progress line, the finite check, and orderly interruption."""

import signal
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

from vgen.errors import UserError
from vgen.training.checkpointing import LAST
from vgen.training.csv_log import CsvLogger
from vgen.training.module import TrainingModule


class InterruptedTrainingError(Exception):
    """Training was stopped by a signal after its state had been saved."""

    def __init__(self, signum: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name}; the state is in {checkpoint}; repeat the command to continue"
        )
        self.exit_code = 128 + signum


class StepCallback(Callback, ABC):
    """Base of callbacks that act once per optimizer step, however many batches one takes."""

    def __init__(self) -> None:
        self._seen = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin counting at the step a resumed run starts from."""
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call :meth:`on_step` if this batch completed an optimizer step."""
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            assert isinstance(pl_module, TrainingModule)
            self.on_step(trainer, pl_module, batch)

    @abstractmethod
    def on_step(self, trainer: pl.Trainer, module: TrainingModule, batch: dict[str, Any]) -> None:
        """Act after an optimizer step."""


class FiniteCheck(StepCallback):
    """Stops a run whose loss is no longer a number, before that state can replace a good checkpoint.

    Args:
        folder: of the checkpoints.
        every: optimizer steps at which the running means are looked at (they stay non-finite once they are).
    """

    def __init__(self, folder: Path, *, every: tuple[int, ...]) -> None:
        super().__init__()
        self.folder = folder
        self.every = every

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, batch: dict[str, Any]) -> None:
        """Raise if a running mean is not finite.

        Raises:
            UserError: with the places of the saved state and batch.
        """
        step = trainer.global_step
        if step < trainer.max_steps and all(step % interval for interval in self.every):
            return
        bad = [name for name, value in module.means().items() if value - value != 0.0]
        if not bad:
            return
        state = self.folder / "nonfinite.ckpt"
        trainer.save_checkpoint(state)
        if trainer.is_global_zero:
            tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
            torch.save(tensors, state.with_suffix(".batch"))
        raise UserError(
            f"{', '.join(bad)} is not finite at step {step}; the state and the last batch are in {state} and "
            f"{state.with_suffix('.batch').name}; lower task.optimizer.lr, warm up longer or use "
            "trainer.precision=32-true"
        )


class Metrics(StepCallback):
    """Writes the means of every log interval, throughput and validation results to the loggers.

    Args:
        every: optimizer steps per row.
        batch_size: images per optimizer step over all processes.
        peak_tflops: peak of one device in tera-operations per second, to report model-FLOPs utilisation; 0 = not.
    """

    def __init__(self, *, every: int, batch_size: int, peak_tflops: float) -> None:
        super().__init__()
        self.every = every
        self.batch_size = batch_size
        self.peak_tflops = peak_tflops
        self.report: dict[str, float] = {}
        self._flops = 0.0
        self._paused = 0.0
        self._pause_began = 0.0
        self._began = 0.0
        self._began_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the CSV log at the right step and start the clock."""
        super().on_train_start(trainer, pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, CsvLogger):
                logger.start(trainer.global_step)
        self._restart_clock(trainer)

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, batch: dict[str, Any]) -> None:
        """Log a row if it is due."""
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        report = module.end_interval()
        seconds = time.monotonic() - self._began - self._paused
        images = (step - self._began_step) * self.batch_size / max(seconds, 1e-9)
        report["images_per_s"] = images
        if tokens := module.count_tokens():
            report["tokens_per_s"] = images * tokens
        if self.peak_tflops:
            self._flops = self._flops or module.flops_per_image(batch)
            report["mfu"] = images * self._flops / trainer.world_size / (self.peak_tflops * 1e12)
        if module.device.type == "cuda":
            report["memory_gib"] = torch.cuda.max_memory_allocated(module.device) / 2**30
        self.report = report
        self._log(trainer, {name if "_per_s" in name else f"train/{name}": v for name, v in report.items()}, step)
        self._restart_clock(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._pause_began = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the validation means."""
        means = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        self.report |= means
        self._log(trainer, means, trainer.global_step)
        self._paused += time.monotonic() - self._pause_began

    def add(self, trainer: pl.Trainer, values: dict[str, float], step: int) -> None:
        """Log figures that another callback measured."""
        self.report |= values
        self._log(trainer, values, step)

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training."""
        self._paused += seconds

    def _restart_clock(self, trainer: pl.Trainer) -> None:
        self._began, self._began_step, self._paused = time.monotonic(), trainer.global_step, 0.0

    @staticmethod
    def _log(trainer: pl.Trainer, values: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)


class Progress(StepCallback):
    """One line over all optimizer steps: a bar on a terminal, otherwise a plain line per log interval.

    Args:
        metrics: where the figures shown come from.
        description: left end of the bar.
        every: optimizer steps between two plain lines.
    """

    def __init__(self, metrics: Metrics, *, description: str, every: int) -> None:
        super().__init__()
        self.metrics = metrics
        self.description = description
        self.every = every
        self._bar: tqdm | None = None
        self._began = 0.0
        self._first = 0

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start at the step a resumed run starts from."""
        super().on_train_start(trainer, pl_module)
        self._began, self._first = time.monotonic(), trainer.global_step
        if sys.stderr.isatty():
            total, first = trainer.max_steps, trainer.global_step
            self._bar = tqdm(desc=self.description, total=total, initial=first, unit="step", dynamic_ncols=True)

    @rank_zero_only
    def on_step(self, trainer: pl.Trainer, module: TrainingModule, batch: dict[str, Any]) -> None:
        """Advance."""
        step = trainer.global_step
        shown = {name: value for name, value in self.metrics.report.items() if name in _SHOWN}
        text = " ".join(f"{_SHOWN[name]} {value:.4g}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)
        elif step % self.every == 0 or step == trainer.max_steps:
            left = (time.monotonic() - self._began) / (step - self._first) * (trainer.max_steps - step)
            line = f"{self.description} {step}/{trainer.max_steps} ETA {tqdm.format_interval(left)} {text}"
            print(line, file=sys.stderr, flush=True)

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the finished bar on the screen."""
        if self._bar is not None:
            self._bar.close()

    @rank_zero_only
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Free the line for the message to come."""
        if self._bar is not None:
            self._bar.close()


_SHOWN = {"loss": "loss", "accuracy": "acc", "val/loss": "val", "images_per_s": "img/s"}


class SaveOnSignal(StepCallback):
    """On SIGTERM or SIGINT: finish the step, save ``last.ckpt`` on all processes together, stop.

    A second signal acts as if this callback were not there.

    Args:
        folder: of the checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._signum = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the two signals, after Lightning has installed its own handlers."""
        super().on_train_start(trainer, pl_module)

        def handle(signum: int, frame: FrameType | None) -> None:
            self._signum = signum
            self._restore()
            launcher: Any = trainer.strategy.launcher
            if signum == signal.SIGTERM and launcher is not None:
                launcher.kill(signum)

        self._previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, batch: dict[str, Any]) -> None:
        """Save and stop if any process was asked to.

        Raises:
            InterruptedTrainingError: after saving.
        """
        signum = self._signum
        if trainer.world_size > 1:
            number = torch.tensor(float(signum), device=module.device)
            signum = int(trainer.strategy.reduce(number, reduce_op="max"))
        if signum:
            path = self.folder / LAST
            trainer.save_checkpoint(path)
            raise InterruptedTrainingError(signum, path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
