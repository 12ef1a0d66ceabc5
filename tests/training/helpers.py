"""Tiny runs of the real configuration."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from tests.paths import CONFIGS, ROOT
from vgen.data.digits import digits
from vgen.data.source import DataSource
from vgen.training.run import Result, train
from vgen.training.settings import RUN_DIR_VARIABLE

COMMON = [
    "data._target_=tests.training.helpers.few_digits",
    "trainer=cpu",
    "num_threads=1",
    "every.log=1",
    "every.validate=0",
    "every.pictures=0",
    "every.checkpoint=1000",
]
TOKENIZER = [
    *COMMON,
    "task=tokenizer",
    "tokenizer.image_size=8",
    "data.image_size=8",
    "tokenizer.base_channels=8",
    "tokenizer.z_channels=8",
    "tokenizer.encoder_multipliers=[1,1,1]",
    "tokenizer.decoder_multipliers=[1,1,1]",
    "tokenizer.codebook_size=32",
    "tokenizer.usage_window=64",
    "task.optimizer.lr=1e-3",
    "task.batch_size=8",
]
GENERATOR = [
    *COMMON,
    "task=generator",
    "~tokenizer",
    "generator=digits",
    "schedule=raster",
    "data.image_size=8",
    "generator.dim=16",
    "generator.depth=2",
    "generator.heads=2",
    "task.optimizer.lr=1e-2",
    "task.batch_size=8",
    "task.cache_codes=false",
]
NO_DROPOUT = [f"generator.{name}_dropout=0" for name in ("token", "residual", "ffn")]


def few_digits(**settings) -> DataSource:
    """180 training and 41 validation images."""
    source = digits(**settings)
    return replace(source, train=source.train.subset(torch.arange(180)), val=source.val.subset(torch.arange(41)))


def broken_digits(**settings) -> DataSource:
    """The same with a picture that could not be read."""
    source = few_digits(**settings)
    return replace(source, train=replace(source.train, broken=("digit 7.png (empty)",)))


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides))


def run(folder: Path, *overrides: str) -> Result:
    return train(composed(*overrides, f"run_dir={folder}", f"paths.cache={folder.parent / 'cache'}"))


def launch(folder: Path, *overrides: str, torchrun: bool) -> Result:
    """The same in a process of its own, or as many as it starts."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"] if torchrun else []
    command = [sys.executable, *start, "train.py", *overrides, f"run_dir={folder}"]
    command.append(f"paths.cache={folder.parent / 'cache'}")
    # The folder of a run before, which a process that torchrun started would take for its own.
    environment = {name: value for name, value in os.environ.items() if name != RUN_DIR_VARIABLE}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return Result(folder, folder / "release", folder / "checkpoints", folder / "metrics.csv", folder / "pictures", {})


def two_processes(images: int) -> list[str]:
    return ["trainer=ddp_cpu2", "task.batch_size=8", f"task.global_batch={images}"]


def score_of(file: Path, samples: int, *more: str) -> list[str]:
    options = [f"score.features={file}", f"score.samples={samples}", "score.batch_size=3", *more]
    return [*options, "task.ema.decay=0.5"]


def column(result: Result, name: str) -> list[float]:
    """Values of a column of metrics.csv, in the order of the steps."""
    import csv

    with result.metrics.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def same(a: object, b: object) -> bool:
    """Whether two nested containers of tensors and plain values are equal, bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b
