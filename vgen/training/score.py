"""A small-sample score during training: Frechet or kernel distance of a few thousand samples every few epochs."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from vgen.data.source import DataSource
from vgen.errors import UserError
from vgen.evaluation.collect import Collected, PictureBatch, Wanted, collect, conventions, read_batches
from vgen.evaluation.extractors import load_for_pictures
from vgen.evaluation.features import Extractor
from vgen.evaluation.frechet import frechet_distance
from vgen.evaluation.metrics import kernel_distance
from vgen.evaluation.real_side import RealSide, measure_reference
from vgen.evaluation.sources import Reference, open_reference, take
from vgen.pixels import from_uint8, to_uint8
from vgen.processes import Processes
from vgen.runtime import progress_bar
from vgen.sampling.pipeline import Pipeline, make_labels
from vgen.sampling.settings import Sampling
from vgen.training.callbacks import Metrics, StepCallback
from vgen.training.generator_module import GeneratorModule
from vgen.training.module import TrainingModule
from vgen.training.tokenizer_module import TokenizerModule

BEST = "best-score.ckpt"
ScoreMetric = Literal["fd", "kid"]
_LONGEST_WAIT = timedelta(hours=24)  # for the slowest process; a dead one is noticed at once


@dataclass(frozen=True)
class ScoreSettings:
    """The config node ``score`` of train.py.

    Attributes:
        every_epochs: epochs between two scores, 0 = not by epochs.
        every_steps: optimizer steps between two scores, 0 = not by steps; with both 0 there is no score.
        metric: ``fd`` (Frechet distance) or ``kid`` (kernel distance, unbiased for few samples).
        features: ``inception``, a registered extractor or the path of a TorchScript file.
        features_name: name of a TorchScript file's scores; its file stem when None.
        weights: file or folder of published weights.
        samples: generated pictures, or originals a tokenizer reconstructs.
        reference: ``data`` (training pictures), ``data.val``, a folder, a file of pictures or of statistics.
        reference_samples: real pictures compared with; None = all.
        batch_size: pictures per batch and process.
        kid_subsets: random subsets of the kernel distance.
        kid_subset_size: pictures per subset.
        labels: classes asked of a generator: ``balanced``, ``random`` or numbers.
    """

    every_epochs: int
    every_steps: int
    metric: ScoreMetric
    features: str | None
    features_name: str | None
    weights: str | None
    samples: int
    reference: str
    reference_samples: int | None
    batch_size: int
    kid_subsets: int
    kid_subset_size: int
    labels: str

    def __post_init__(self) -> None:
        for key in ("every_epochs", "every_steps"):
            if not isinstance(getattr(self, key), int) or getattr(self, key) < 0:
                raise UserError(f"score.{key}={getattr(self, key)} must be a whole number of at least 0 (0 = not)")
        if not self.active:
            return
        if self.every_epochs and self.every_steps:
            raise UserError("score.every_epochs and score.every_steps are both set; set one of them to 0")
        if self.metric not in get_args(ScoreMetric):
            raise UserError(f"score.metric={self.metric} is unknown; choose one of {', '.join(get_args(ScoreMetric))}")
        if self.features is None:
            raise UserError("score needs an extractor: set score.features to inception or to a TorchScript file")
        least = {"samples": 2, "reference_samples": 2, "kid_subset_size": 2}
        for key in ("samples", "reference_samples", "batch_size", "kid_subsets", "kid_subset_size"):
            value = getattr(self, key)
            if key == "reference_samples" and value is None:
                continue
            if not isinstance(value, int) or value < least.get(key, 1):
                raise UserError(f"score.{key}={value} must be a whole number of at least {least.get(key, 1)}")

    @property
    def active(self) -> bool:
        """Whether a score is asked for."""
        return bool(self.every_epochs or self.every_steps)


class Score(StepCallback):
    """Scores the averaged weights on all processes together and keeps ``best-score.ckpt``, the state with the lowest.

    A generator is scored by samples against real pictures, a tokenizer by reconstructions against their originals.
    Sample i is made by process i mod world size from its own random numbers, so the score does not depend on the number
    of processes. They talk once at the end, over a group of their own that waits for the slowest; a failure in one
    process stops all.

    Args:
        folder: of the checkpoints.
        settings: what to compute.
        source: data set that ``reference=data`` means, None where the run trains on cached codes.
        sampling: how to sample (generators).
        seed: of labels and subsets.
        device: of the extractor.
        cache: folder of reference statistics, shared with evaluate.py.
        metrics: where the score is logged, and whose clock is stopped meanwhile.

    Raises:
        UserError: for a missing extractor or reference, before the training starts.
    """

    def __init__(
        self,
        folder: Path,
        *,
        settings: ScoreSettings,
        source: DataSource | None,
        sampling: Sampling,
        seed: int,
        device: torch.device,
        cache: str | None,
        metrics: Metrics,
    ) -> None:
        super().__init__()
        assert settings.features is not None
        self.folder = folder
        self.settings = settings
        self.sampling = sampling
        self.seed = seed
        self.metrics = metrics
        self.every = settings.every_steps
        self.best: float | None = None
        self.extractor: Extractor = load_for_pictures(
            settings.features, name=settings.features_name, weights=settings.weights, device=device
        )
        reference = open_reference(
            settings.reference, source=source, seed=seed, key="score.reference", expected=conventions(self.extractor)
        )
        if reference.pictures is not None and reference.statistics is None:
            pictures, _ = take(reference.pictures, settings.reference_samples, key="score.reference")
            reference = replace(reference, pictures=pictures)
        elif reference.pictures is None and settings.metric == "kid":
            raise UserError(
                f"score.reference={settings.reference} holds statistics only, but score.metric=kid needs pictures"
            )
        self.reference = reference
        self.cache = cache
        self._real: RealSide | None = None
        self._processes = Processes()

    @property
    def name(self) -> str:
        """Column of the score; it holds the number of samples, on which every such score depends."""
        return f"score/{self.extractor.score_name(self.settings.metric)}_n{self.settings.samples}"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Turn epochs into steps, join the processes and measure the reference.

        Raises:
            UserError: if the pictures do not fit or are too few.
        """
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, TrainingModule)
        if self.settings.every_epochs:
            batches = int(trainer.num_training_batches)
            per_step = int(pl_module.hparams["config"]["task"]["accumulate"])
            self.every = max(1, self.settings.every_epochs * batches // per_step)
        if trainer.world_size > 1:
            group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
            self._processes = Processes(trainer.global_rank, trainer.world_size, group)
        if isinstance(pl_module, TokenizerModule):
            self._cut_originals()
        began = time.monotonic()
        kid = self.settings.metric == "kid"
        self._real = measure_reference(
            self.reference,
            Wanted(gaussian=not kid, features=kid),
            extractor=self.extractor,
            processes=self._processes,
            size=self.settings.batch_size,
            cache=self.cache,
            warnings=[],
        )
        self.metrics.pause(time.monotonic() - began)

    def _cut_originals(self) -> None:
        """A tokenizer is scored on the first ``samples`` pictures of the reference, against the same pictures."""
        if self.reference.pictures is None:
            raise UserError(
                f"score.reference={self.settings.reference} holds no pictures for the tokenizer to reconstruct"
            )
        count = min(self.settings.samples, len(self.reference.pictures))
        pictures, _ = take(self.reference.pictures, count, key="score.reference")
        self.reference = Reference(self.reference.name, pictures)

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, batch: dict[str, Any]) -> None:
        """Score if it is due, and after the last step."""
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        began = time.monotonic()
        value = self.measure(module)
        self.metrics.add(trainer, {self.name: value}, step)
        if self.best is None or value < self.best:
            self.best = value
            trainer.save_checkpoint(self.folder / BEST)
        self.metrics.pause(time.monotonic() - began)

    def measure(self, module: TrainingModule) -> float:
        """The score of the averaged weights, the same on every process; all of them must call this together."""
        training = module.network.training
        module.network.eval()
        try:
            with module.averaged_weights():
                made = self._collect(self._batches(module), self._count(module))
        finally:
            module.network.train(training)
        assert self._real is not None
        value = torch.zeros(1, dtype=torch.float64)
        failure: Exception | None = None
        if self._processes.rank == 0:
            try:
                value[0] = self._distance(made, self._real)
            except Exception as error:
                failure = error
        self._processes.agree(failure)
        return float(self._processes.sum(value))

    def _distance(self, made: Collected, real: RealSide) -> float:
        if self.settings.metric == "fd":
            assert made.gaussian is not None
            assert real.statistics is not None
            return frechet_distance(made.gaussian, real.statistics.pool)
        assert made.features is not None
        assert real.features is not None
        size = min(self.settings.kid_subset_size, len(made.features), len(real.features))
        return kernel_distance(
            made.features, real.features, subsets=self.settings.kid_subsets, subset_size=size, seed=self.seed
        )[0]

    def _count(self, module: TrainingModule) -> int:
        if not isinstance(module, TokenizerModule):
            return self.settings.samples
        assert self.reference.pictures is not None
        return len(self.reference.pictures)

    def _collect(self, batches: Iterator[PictureBatch], total: int) -> Collected:
        kid = self.settings.metric == "kid"
        return collect(
            batches,
            total=total,
            wanted=Wanted(gaussian=not kid, features=kid),
            extractor=self.extractor,
            processes=self._processes,
            name=self.reference.name,
        )

    def _batches(self, module: TrainingModule) -> Iterator[PictureBatch]:
        if isinstance(module, TokenizerModule):
            yield from self._reconstructions(module)
        else:
            assert isinstance(module, GeneratorModule)
            yield from self._samples(module)

    def _samples(self, module: GeneratorModule) -> Iterator[PictureBatch]:
        pipeline = Pipeline(generator=module.generator, tokenizer=module.tokenizer, plan=module.plan, engine="eager")
        count = self.settings.samples
        labels = make_labels(self.settings.labels, count, pipeline.num_classes, seed=self.seed)
        mine = torch.tensor(list(self._processes.share(count)), dtype=torch.int64)
        with progress_bar("score: sampling", total=len(mine), unit="img") as bar:
            for index in mine.split(self.settings.batch_size):
                yield PictureBatch(pipeline.generate(labels[index], index, self.sampling), labels[index], index)
                bar.update(len(index))

    def _reconstructions(self, module: TokenizerModule) -> Iterator[PictureBatch]:
        assert self.reference.pictures is not None
        batches = read_batches(
            self.reference.pictures,
            batch_size=self.settings.batch_size,
            processes=self._processes,
            description="score: reconstructions",
        )
        for batch in batches:
            with torch.inference_mode():
                ids = module.tokenizer.encode(from_uint8(batch.pictures).to(module.device))
                made = to_uint8(module.tokenizer.decode(ids))
            yield PictureBatch(made, batch.labels, batch.index)
