"""Samples drawn from a generator's release folder into a folder of their own, which a repeated job goes on with."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen.checkpoints.release import CONFIG, TOKENIZER, WEIGHTS, file_sha256, load_pipeline, read_config
from vgen.errors import UserError
from vgen.evaluation.pictures import Pictures
from vgen.evaluation.readers import open_pictures
from vgen.processes import Processes
from vgen.sampling.job import run_sampling
from vgen.sampling.pipeline import Pipeline, make_labels
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
        samples: folder the samples are written to; what a killed job left there is kept.
        labels: int64 [n], requested class of every sample.
        labels_kind: how they were chosen.
        sampling: settings.
        batch_size: samples decoded at once.
        identity: everything the samples depend on; a folder of other samples is refused.
        frames: None, the samples are pictures.
    """

    pipeline: Pipeline
    folder: Path
    samples: Path
    labels: Tensor
    labels_kind: str
    sampling: Sampling
    batch_size: int
    identity: dict[str, Any]
    frames: int | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        samples: Path,
        count: int | None,
        labels: str,
        sampling: dict[str, Any],
        settings: Sampling,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        schedule: dict | None,
        picture_size: int | None,
        num_tokens: int | None,
        text_features: str | None,
    ) -> "Generation":
        """Load a release folder and choose the labels of ``count`` samples.

        Args:
            folder: release of a generator.
            samples: folder for the samples.
            count: number of samples, 1000 when None.
            labels: see :func:`vgen.sampling.pipeline.make_labels`.
            sampling: configuration of ``settings``, stored with the samples.
            settings: temperature, guidance, ...
            batch_size: samples decoded at once by a process.
            device: where to run.
            dtype: of the generator.
            schedule: configuration of the decode order, None for the one the generator was trained with.
            picture_size: side in pixels; None = as decoded.
            num_tokens: decide only the first tokens of every sample; None = all.
            text_features: file with the features of the captions that labels count, for a generator on text.
        """
        pipeline = load_pipeline(
            folder,
            device=device,
            dtype=dtype,
            schedule=schedule,
            picture_size=picture_size,
            num_tokens=num_tokens,
            text_features=text_features,
        )
        requested = make_labels(labels, count or DEFAULT_SAMPLES, pipeline.num_classes, seed=settings.seed)
        identity = {
            "checkpoint_sha256": file_sha256(folder / WEIGHTS),
            "sampling": sampling,
            "schedule": schedule,
            "dtype": str(dtype).removeprefix("torch."),
            "picture_size": pipeline.picture_size,
            **({} if num_tokens is None else {"num_tokens": num_tokens}),
            **({} if text_features is None else {"text_features_sha256": file_sha256(text_features)}),
        }
        return cls(pipeline, folder, samples, requested, labels, settings, batch_size, identity)

    def draw(self, processes: Processes) -> Pictures:
        """Draw the samples that are missing, all processes together, and open the whole set.

        Raises:
            UserError: if the folder holds samples of another configuration or the disk is full.
        """
        run_sampling(
            self.pipeline,
            self.sampling,
            peers=processes,
            identity=self.identity,
            out=str(self.samples),
            num_samples=len(self.labels),
            labels=self.labels_kind,
            batch_size=self.batch_size,
            fmt="npz",
            grid_pictures=100,
        )
        return open_pictures(self.samples, key="samples")

    def describe(self, drawn: Pictures) -> dict:
        """What a report must say about the samples' origin.

        Args:
            drawn: what :meth:`draw` returned.
        """
        origin = drawn.origin or {}
        return {
            "checkpoint": str(self.folder),
            "sha256": self.identity["checkpoint_sha256"],
            "tokenizer_sha256": file_sha256(self.folder / TOKENIZER / WEIGHTS),
            "schedule": self.pipeline.plan.name,
            "schedule_config": self.identity["schedule"],
            "labels": self.labels_kind,
            "precision": self.identity["dtype"],
            "picture_size": self.pipeline.picture_size,
            "num_tokens": self.pipeline.num_tokens or self.pipeline.plan.num_tokens,
            "forward_passes": self.pipeline.num_passes or len(self.pipeline.plan.forwards),
            "images_per_s": origin.get("images_per_s"),
            "folder": str(self.samples),
            **asdict(self.sampling),
        }
