"""From a training state to a release folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from vgen.checkpoints.release import save_release
from vgen.training.module import TrainingModule
from vgen.training.parts import Parts

FOLDER = "release"


class ReleaseAtEnd(Callback):
    """Writes ``<run>/release`` when training ends.

    It acts while the network is still on its devices, because sharded weights can only be gathered there. The averaged
    weights are released, or the last ones when none are averaged.

    Args:
        run_dir: folder of the run.
        parts: what is released.
    """

    def __init__(self, run_dir: Path, parts: Parts) -> None:
        self.run_dir = run_dir
        self.parts = parts
        self.written = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather on all processes, write on the first."""
        assert isinstance(pl_module, TrainingModule)
        with pl_module.averaged_weights():
            state = trainer.strategy.lightning_module_state_dict()
            if trainer.is_global_zero:
                write_release(self.run_dir, self.parts, network_state(state))
        trainer.strategy.barrier()
        self.written = True


def write_release(run_dir: Path, parts: Parts, weights: dict[str, Tensor]) -> None:
    """Write weights under the network's own names, with the constructor arguments they belong to."""
    save_release(
        run_dir / FOLDER,
        parts.module.network,
        parts.network,
        kind=parts.module.task,
        extra=parts.extra,
        tokenizer=parts.tokenizer_release,
        state=weights,
    )


def network_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's part of a training module's state dict, under the network's own names."""
    return {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}


def released_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights that a checkpoint stands for: averaged where it holds averages, its own elsewhere."""
    averages = checkpoint["ema"]["average"] if "ema" in checkpoint else {}
    return network_state(checkpoint["state_dict"]) | averages
