"""Checkpoints for resuming: written atomically, checked before any work, found by themselves."""

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from vgen.errors import UserError

LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a kill or a full disk leaves the previous checkpoint whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save to ``path``.

        Raises:
            UserError: if the file cannot be written.
        """
        path = Path(path)
        partial = path.with_name(f"{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        # torch.save reports a full disk as RuntimeError.
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise UserError(
                f"the checkpoint {path} cannot be written ({error}); free space and repeat the command, which resumes "
                "from the previous checkpoint"
            ) from error


class StepCheckpoint(ModelCheckpoint):
    """``last.ckpt`` every few optimizer steps and when training ends, optionally with kept milestones.

    Args:
        folder: of the checkpoints.
        every: optimizer steps between two.
        keep: milestones kept beside ``last.ckpt``: 0 = none, -1 = all, n = the newest n.
    """

    def __init__(self, folder: Path, *, every: int, keep: int) -> None:
        super().__init__(
            dirpath=folder,
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            monitor="step" if keep > 0 else None,
            mode="max",
            save_top_k=keep,
            save_last=True,
            every_n_train_steps=every,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self._last_path = folder / LAST

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when due; also after the last step, whether the steps or the time ran out."""
        before = self._last_global_step_saved
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        over = trainer.should_stop or trainer.global_step >= trainer.max_steps
        if over and trainer.global_step not in (before, self._last_global_step_saved):
            # As a save of the base class, which otherwise repeats it when training has ended.
            self._save_checkpoint(trainer, str(self._last_path))


def best_checkpoint(folder: Path) -> ModelCheckpoint:
    """Keep ``best.ckpt``, the state with the lowest validation loss."""
    return ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor="val/loss",
        mode="min",
        save_top_k=1,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of ours on the CPU without running any code from it.

    Raises:
        UserError: if the file is missing, damaged or not written by vgen.
    """
    if not path.is_file():
        raise UserError(f"resume={path}: there is no such checkpoint file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # A damaged zip archive raises RuntimeError, a foreign pickle UnpicklingError, an empty file EOFError.
    except Exception as error:
        raise UserError(
            f"resume={path}: the file is truncated or not a checkpoint ({type(error).__name__}); use another one "
            "or start anew with another run_name"
        ) from error
    if not isinstance(checkpoint, dict) or "vgen_task" not in checkpoint or "state_dict" not in checkpoint:
        raise UserError(f"resume={path}: this is not a vgen training checkpoint; give <run>/checkpoints/last.ckpt")
    return checkpoint


def check_fits(checkpoint: dict[str, Any], module: Any, path: Path) -> None:
    """Compare a checkpoint with the module that is to continue from it.

    Args:
        checkpoint: from :func:`read_checkpoint`.
        module: the training module, freshly built.
        path: for messages.

    Raises:
        UserError: naming the first difference.
    """
    if checkpoint["vgen_task"] != module.task:
        raise UserError(f"resume={path} trained a {checkpoint['vgen_task']}, this run trains a {module.task}")
    saved, mine = checkpoint["state_dict"], module.state_dict()
    for name in sorted(saved.keys() | mine.keys()):
        if name not in saved or name not in mine:
            side = "lacks" if name not in saved else "also holds"
            raise UserError(f"resume={path} is of another architecture: it {side} {name}; use the same configuration")
        if saved[name].shape != mine[name].shape:
            raise UserError(
                f"resume={path} is of another architecture: {name} has shape {list(saved[name].shape)}, this run's "
                f"has {list(mine[name].shape)}; use the same configuration"
            )
    if ("ema" in checkpoint) != (module.ema is not None):
        state = "has" if "ema" in checkpoint else "has no"
        raise UserError(f"resume={path} {state} averaged weights; set task.ema.decay as in the interrupted run")


def find_checkpoint(run_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint a run starts from.

    Args:
        run_dir: folder of the run.
        resume: ``auto`` (its own last checkpoint, if any), ``never`` or a path.

    Returns:
        A path, or None for a fresh start.

    Raises:
        UserError: if ``never`` meets an existing run, or the path does not exist.
    """
    last = run_dir / "checkpoints" / LAST
    if resume == "auto":
        return last if last.exists() else None
    if resume == "never":
        if last.exists() or (run_dir / "metrics.csv").exists():
            raise UserError(f"{run_dir} holds a run and resume=never; choose another run_name, or resume=auto")
        return None
    path = Path(str(resume))
    if not path.is_file():
        raise UserError(f"resume={resume}: there is no such checkpoint file (auto, never or a path)")
    return path
