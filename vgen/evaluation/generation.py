"""Samples drawn from a generator's release folder while they are scored."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from vgen.checkpoints.release import CONFIG, TOKENIZER, WEIGHTS, file_sha256, load_pipeline, read_config
from vgen.errors import UserError
from vgen.evaluation.collect import PictureBatch
from vgen.sampling.pipeline import Pipeline, make_labels, sample_stream
from vgen.sampling.settings import Sampling

DEFAULT_SAMPLES = 1000


def is_release(path: Path) -> bool:
    """Whether a folder is a release folder (configuration and weights)."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def release_kind(folder: Path) -> str:
    """Whether a release folder holds a ``generator`` or a ``tokenizer``.

    Raises:
        UserError: if it is no release folder or of another kind.
    """
    try:
        read_config(folder, "generator")
    except UserError:
        read_config(folder, "tokenizer")
        return "tokenizer"
    return "generator"


@dataclass(frozen=True)
class Generation:
    """A generator ready to be sampled and scored.

    Attributes:
        pipeline: generator, tokenizer and decode order.
        folder: release folder.
        labels: int64 [n], requested class of every sample.
        labels_kind: how they were chosen.
        sampling: settings.
        batch_size: samples decoded at once.
        schedule: configuration of the decode order, None for the one the generator was trained with.
    """

    pipeline: Pipeline
    folder: Path
    labels: Tensor
    labels_kind: str
    sampling: Sampling
    batch_size: int
    schedule: dict | None

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        count: int | None,
        labels: str,
        sampling: Sampling,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        schedule: dict | None,
    ) -> "Generation":
        """Load a release folder and choose the labels of ``count`` samples."""
        pipeline = load_pipeline(folder, device=device, dtype=dtype, schedule=schedule)
        requested = make_labels(labels, count or DEFAULT_SAMPLES, pipeline.num_classes, seed=sampling.seed)
        return cls(pipeline, folder, requested, labels, sampling, batch_size, schedule)

    def batches(self) -> Iterator[PictureBatch]:
        """Draw this process's share of the samples."""
        for batch in sample_stream(self.pipeline, self.labels, self.sampling, batch_size=self.batch_size):
            yield PictureBatch(batch.images, batch.labels, batch.index)

    def describe(self) -> dict:
        """What a report must say about the samples' origin."""
        weights = next(self.pipeline.generator.parameters())
        return {
            "checkpoint": str(self.folder),
            "sha256": file_sha256(self.folder / WEIGHTS),
            "tokenizer_sha256": file_sha256(self.folder / TOKENIZER / WEIGHTS),
            "schedule": self.schedule,
            "labels": self.labels_kind,
            "precision": str(weights.dtype).removeprefix("torch."),
            "forward_passes": len(self.pipeline.plan.forwards),
            **asdict(self.sampling),
        }
