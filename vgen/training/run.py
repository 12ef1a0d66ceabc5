"""What train.py calls: from a composed configuration to a trained, released network."""

import json
import logging
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from vgen.data.loader import ResumableLoader, build_loader
from vgen.data.source import DataSource
from vgen.errors import UserError
from vgen.runtime import git_commit, versions, writable_folder
from vgen.training.callbacks import FiniteCheck, Metrics, Progress, SaveOnSignal
from vgen.training.checkpointing import (
    AtomicCheckpointIO,
    StepCheckpoint,
    best_checkpoint,
    check_fits,
    find_checkpoint,
    read_checkpoint,
)
from vgen.training.parts import Parts, Source, build_parts, training_data
from vgen.training.pictures import Pictures
from vgen.training.releasing import FOLDER, ReleaseAtEnd, released_weights, write_release
from vgen.training.score import Score, ScoreSettings
from vgen.training.settings import Node, check, make, resolve, run_folder


@dataclass(frozen=True)
class Result:
    """Where a run left its results.

    Attributes:
        run_dir: folder of the run.
        release: release folder.
        checkpoints: folder with last.ckpt and best.ckpt.
        metrics: the CSV log.
        pictures: folder with picture grids.
        figures: last measurements.
    """

    run_dir: Path
    release: Path
    checkpoints: Path
    metrics: Path
    pictures: Path
    figures: dict[str, float]


def train(config: DictConfig) -> Result:
    """Run a training configuration to its end.

    Raises:
        UserError: for anything the user can correct, before any work is done.
        InterruptedTrainingError: if a signal stopped the run after its state was saved.
    """
    _quieten()
    settings = resolve(config)
    check(settings)
    run_dir = writable_folder(run_folder(settings), "run_dir")
    OmegaConf.update(config, "run_dir", str(run_dir))
    settings = resolve(config)
    start = find_checkpoint(run_dir, settings["resume"])
    checkpoint = None if start is None else read_checkpoint(start)
    torch.set_float32_matmul_precision(settings["matmul_precision"])
    if settings["num_threads"] is not None:
        torch.set_num_threads(settings["num_threads"])
    torch.manual_seed(settings["seed"])
    parts = build_parts(settings)
    if start is not None and checkpoint is not None:
        check_fits(checkpoint, parts.module, start)
        say(_changes(checkpoint["hyper_parameters"]["config"], settings))
        say([f"continuing from {start} at step {checkpoint['global_step']}"])
    trainer, metrics = build_trainer(settings, parts, run_dir)
    release = ReleaseAtEnd(run_dir, parts)
    vars(trainer)["callbacks"].append(release)
    if checkpoint is None or checkpoint["global_step"] < trainer.max_steps:
        del checkpoint
        fit(settings, parts, trainer, run_dir, start)
    if not release.written and start is not None and trainer.is_global_zero:
        # Nothing was left to do: the steps or the time of the run were over before.
        write_release(run_dir, parts, released_weights(read_checkpoint(start)))
    result = Result(
        run_dir=run_dir,
        release=run_dir / FOLDER,
        checkpoints=run_dir / "checkpoints",
        metrics=run_dir / "metrics.csv",
        pictures=run_dir / "pictures",
        figures=metrics.report,
    )
    say(_summary(result))
    return result


def fit(config: Node, parts: Parts, trainer: pl.Trainer, run_dir: Path, start: Path | None) -> None:
    """Prepare the data and train."""
    say([_describe(config, parts, trainer)])
    source = training_data(config, parts, trainer.strategy.root_device)
    training, validation = build_loaders(config, source, trainer)
    _record(run_dir, config)
    trainer.fit(parts.module, training, validation, ckpt_path=start, weights_only=True)
    _report_broken([training] if validation is None else [training, validation])


# Lightning's remarks about what is done here on purpose, by how they begin.
_REMARKS = (
    ".*isinstance.treespec",
    "You defined a `validation_step` but have no",
    "The number of training batches",
    "Using ModelCheckpoint with manual optimization",
    "Checkpoint directory .* exists and is not empty",
    ".*does not have many workers",
    "The dirpath has changed",
    "The `srun` command is available",
    "Found .* module.s. in eval mode",
)


def _quieten() -> None:
    """Leave the screen to our own lines and to warnings that mean something."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for remark in _REMARKS:
        warnings.filterwarnings("ignore", message=remark)


def build_trainer(config: Node, parts: Parts, run_dir: Path) -> tuple[pl.Trainer, Metrics]:
    """The Lightning trainer with our callbacks and loggers.

    Raises:
        UserError: if devices are missing or the global batch is not the one asked for.
    """
    task, every, node = config["task"], config["every"], dict(config["trainer"])
    if isinstance(node["strategy"], dict):
        node["strategy"] = make(node["strategy"], "trainer.strategy")
    automatic = parts.module.automatic_optimization
    trainer: pl.Trainer = make(
        {name: value for name, value in node.items() if name != "strategy"},
        "trainer",
        strategy=node["strategy"],
        accumulate_grad_batches=task["accumulate"] if automatic else 1,
        max_epochs=-1,
        val_check_interval=max(1, every["validate"]) * task["accumulate"],
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if every["validate"] else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=[make(entry, f"logger.{name}") for name, entry in config["logger"].items() if entry],
        plugins=_plugins(),
        default_root_dir=run_dir,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    images = task["batch_size"] * task["accumulate"] * trainer.world_size
    if task["global_batch"] not in (None, images):
        raise UserError(
            f"task.global_batch={task['global_batch']} differs from batch_size {task['batch_size']} x accumulate "
            f"{task['accumulate']} x {trainer.world_size} device(s) = {images}; change one of them"
        )
    metrics = Metrics(every=every["log"], batch_size=images, peak_tflops=config["peak_tflops"])
    callbacks: list[pl.Callback] = vars(trainer)["callbacks"]
    callbacks.extend(_callbacks(config, parts, run_dir, metrics, trainer.strategy.root_device))
    return trainer, metrics


def _plugins() -> list[Any]:
    """Atomic checkpoints; under SLURM without Lightning's own requeueing, which would save elsewhere than we do."""
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return plugins


def _callbacks(config: Node, parts: Parts, run_dir: Path, metrics: Metrics, device: torch.device) -> list[pl.Callback]:
    """In the order in which they act after a step; checkpoints come last, when all measurements are taken."""
    every, folder = config["every"], run_dir / "checkpoints"
    callbacks: list[pl.Callback] = [FiniteCheck(folder, every=(every["log"], every["checkpoint"])), metrics]
    if every["pictures"]:
        originals = None
        if parts.module.task != "generator" or getattr(parts.module, "given_frames", None) is not None:
            count = min(config["pictures"], len(parts.source.val))
            originals = torch.stack([parts.source.val[index]["pixels"] for index in range(count)])
        sampling = make(config["sampling"], "sampling")
        pictures = run_dir / "pictures"
        callbacks.append(
            Pictures(
                pictures,
                every=every["pictures"],
                count=config["pictures"],
                originals=originals,
                sampling=sampling,
                metrics=metrics,
            )
        )
    score = ScoreSettings(**config["score"])
    if score.active:
        callbacks.append(
            Score(
                folder,
                settings=score,
                source=parts.source if isinstance(parts.source, DataSource) else None,
                sampling=make(config["sampling"], "sampling"),
                seed=config["seed"],
                device=device,
                cache=str(Path(config["paths"]["cache"]) / "statistics"),
                metrics=metrics,
            )
        )
    callbacks.append(Progress(metrics, description=config["run_name"], every=every["log"]))
    callbacks.append(SaveOnSignal(folder))
    callbacks.append(StepCheckpoint(folder, every=every["checkpoint"], keep=config["keep_checkpoints"]))
    if every["validate"]:
        callbacks.append(best_checkpoint(folder))
    return callbacks


def build_loaders(config: Node, source: Source, trainer: pl.Trainer) -> tuple[ResumableLoader, ResumableLoader | None]:
    """Training and validation batches of this process."""
    task = config["task"]
    share = {"rank": trainer.global_rank, "world_size": trainer.world_size, "num_workers": task["num_workers"]}
    size = task["batch_size"]
    training = build_loader(source.train, batch_size=size, seed=config["seed"], shuffle=True, drop_last=True, **share)
    if not config["every"]["validate"]:
        return training, None
    validation = build_loader(source.val, batch_size=size, seed=0, shuffle=False, drop_last=False, **share)
    return training, validation


@rank_zero_only
def say(lines: Iterable[str]) -> None:
    """Print on the first process."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


@rank_zero_only
def _record(run_dir: Path, config: Node) -> None:
    """Write what the run is made of: the resolved configuration and the environment."""
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {"commit": git_commit(), "versions": versions(), "command": sys.argv}
    if torch.cuda.is_available():
        environment["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=2))


@rank_zero_only
def _report_broken(loaders: Iterable[ResumableLoader]) -> None:
    for loader in loaders:
        if summary := loader.broken.summary():
            print(summary, file=sys.stderr, flush=True)


def _describe(config: Node, parts: Parts, trainer: pl.Trainer) -> str:
    task = config["task"]
    millions = sum(p.numel() for p in parts.module.network.parameters()) / 1e6
    images = task["batch_size"] * task["accumulate"] * trainer.world_size
    return (
        f"training a {task['name']} of {millions:.1f} M parameters on {parts.source.name}: {trainer.max_steps} steps "
        f"of {images} images "
        f"({task['batch_size']} x {task['accumulate']} accumulated x {trainer.world_size} device(s), "
        f"{trainer.strategy.root_device.type}, {config['trainer']['precision']})"
    )


def _changes(old: Any, new: Any, key: str = "") -> list[str]:
    """Lines naming what differs between the configuration of a checkpoint and that of the run that continues it."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = list(dict.fromkeys([*old, *new]))
        return [line for n in names for line in _changes(old.get(n), new.get(n), f"{key}.{n}" if key else str(n))]
    if old == new or key.split(".")[0] in ("resume", "run_dir", "paths", "logger"):
        return []
    return [f"note: {key} was {old} in the interrupted run and is {new} now"]


def _summary(result: Result) -> list[str]:
    shown = {name: value for name, value in result.figures.items() if name != "lr"}
    return [
        " ".join(f"{name} {value:.4g}" for name, value in shown.items()),
        f"pictures     {result.pictures}",
        f"metrics      {result.metrics}",
        f"checkpoints  {result.checkpoints}",
        f"release      {result.release}",
    ]
