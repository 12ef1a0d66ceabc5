"""Score a set of samples against real pictures."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vgen.errors import UserError
from vgen.evaluation import metrics as scores
from vgen.evaluation.classifier import LabelledPictures, classifier_accuracy
from vgen.evaluation.collect import Collected, PictureBatch, Wanted, collect, read_batches
from vgen.evaluation.features import Extractor
from vgen.evaluation.frechet import frechet_distance
from vgen.evaluation.generation import Generation
from vgen.evaluation.nearest import nearest_neighbours, save_nearest
from vgen.evaluation.pictures import Pictures
from vgen.evaluation.report import label_histogram
from vgen.evaluation.settings import SAMPLE_METRICS, EvaluationSettings
from vgen.evaluation.sources import Reference
from vgen.processes import Processes


@dataclass
class SamplesJob:
    """Samples against a reference.

    Attributes:
        samples: stored pictures, or a generator to draw them from.
        reference: real pictures.
        settings: metrics and conventions.
        extractor: feature extractor, if a metric needs one.
        picture: where to write the nearest-neighbour picture.
        skipped: metrics that do not apply, with the reason; filled when the job is made.
        warnings: remarks for the report.
    """

    samples: Pictures | Generation
    reference: Reference
    settings: EvaluationSettings
    extractor: Extractor | None
    picture: Path
    warnings: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.skipped = self._inapplicable()
        self.active = [m for m in self.settings.metrics if m not in self.skipped]
        if not self.active:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
            raise UserError(f"evaluation.metrics: none of them applies to these samples ({reasons})")
        self._check_labels()

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.samples.labels) if isinstance(self.samples, Generation) else len(self.samples)

    def _inapplicable(self) -> dict[str, str]:
        reasons = {m: "needs job=reconstruction" for m in self.settings.metrics if m not in SAMPLE_METRICS}
        logits = self.extractor is not None and self.extractor.classes is not None
        for metric in ("isc", "accuracy"):
            if metric in self.settings.metrics and not logits:
                reasons[metric] = "the extractor returns no logits"
        if "accuracy" in self.settings.metrics and self.extractor is not None and self.extractor.is_inception:
            reasons["accuracy"] = "the classes of the Inception network are not those of the data"
        for metric in ("accuracy", "classifier"):
            if metric in self.settings.metrics and self.samples.labels is None:
                reasons[metric] = "the samples carry no labels"
        if "classifier" in self.settings.metrics and self.reference.pictures.labels is None:
            reasons["classifier"] = "the reference carries no labels"
        return reasons

    def _check_labels(self) -> None:
        labels = self.samples.labels
        if labels is None:
            return
        known = {}
        if "accuracy" in self.active and self.extractor is not None:
            known["the extractor"] = self.extractor.classes or 0
        if "classifier" in self.active and self.reference.pictures.labels is not None:
            known["the reference"] = int(self.reference.pictures.labels.max()) + 1
        for who, classes in known.items():
            if int(labels.min()) < 0 or int(labels.max()) >= classes:
                bad = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
                raise UserError(f"samples carry the label {bad} but {who} knows the classes 0..{classes - 1}")

    def run(self, processes: Processes) -> dict:
        """Compute the metrics; the result is complete on process 0.

        Returns:
            The parts of the report that this job knows.
        """
        wants = set(self.active)
        wanted = Wanted(
            gaussian=self.settings.wants_frechet,
            features=bool(wants & {"kid", "prc"}),
            logits=bool(wants & {"isc", "accuracy"}),
            pictures=bool(wants & {"classifier", "nearest"}),
        )
        samples = self._collect(self._sample_batches(processes), self.count, wanted, processes)
        real = None
        if wanted.gaussian or wanted.features:
            for_reference = Wanted(gaussian=wanted.gaussian, features=wanted.features)
            real = self._read(self.reference.pictures, for_reference, processes, "reference")
        values: dict[str, float] = {}
        saved: dict[str, str] = {}
        splits = None
        if wanted.pictures:
            parts = {"training part": self.reference.training, "held-out part": self.reference.held_out}
            splits = [self._read(part, Wanted(pictures=True), processes, name) for name, part in parts.items()]
        if processes.rank == 0:
            if real is not None:
                self._compare_sizes(samples, real)
                values |= self._distances(samples, real)
            values |= self._logit_scores(samples)
            if splits is not None:
                values |= self._pixel_checks(samples, splits, saved)
        return self._result(samples, values, saved)

    def _collect(self, batches: Iterator[PictureBatch], total: int, wanted: Wanted, processes: Processes) -> Collected:
        return collect(batches, total=total, wanted=wanted, extractor=self.extractor, processes=processes)

    def _read(self, pictures: Pictures, wanted: Wanted, processes: Processes, description: str) -> Collected:
        batches = read_batches(
            pictures, batch_size=self.settings.batch_size, processes=processes, description=description
        )
        return self._collect(batches, len(pictures), wanted, processes)

    def _sample_batches(self, processes: Processes) -> Iterator[PictureBatch]:
        if isinstance(self.samples, Generation):
            return self.samples.batches()
        return read_batches(
            self.samples, batch_size=self.settings.batch_size, processes=processes, description="samples"
        )

    def _compare_sizes(self, samples: Collected, real: Collected) -> None:
        if samples.size != real.size:
            self.warnings.append(
                f"samples are {samples.size[1]}x{samples.size[0]}, the reference {real.size[1]}x{real.size[0]}; "
                f"the extractor resized both"
            )

    def _distances(self, samples: Collected, real: Collected) -> dict[str, float]:
        extractor, settings = self.extractor, self.settings
        assert extractor is not None
        values: dict[str, float] = {}
        if samples.gaussian is not None and real.gaussian is not None:
            values[extractor.score_name("fd")] = frechet_distance(samples.gaussian, real.gaussian)
            fewest = min(samples.count, real.count)
            if fewest <= extractor.dim:
                self.warnings.append(
                    f"{fewest} pictures are fewer than the {extractor.dim} feature dimensions need: the covariance is "
                    f"singular and the Frechet distance strongly biased"
                )
        if samples.features is not None and real.features is not None:
            values |= self._feature_set_scores(samples.features, real.features, extractor, settings)
        return values

    def _feature_set_scores(
        self, samples: torch.Tensor, real: torch.Tensor, extractor: Extractor, settings: EvaluationSettings
    ) -> dict[str, float]:
        values: dict[str, float] = {}
        fewest = min(len(samples), len(real))
        if "kid" in self.active:
            size = min(settings.kid_subset_size, fewest)
            if size < settings.kid_subset_size:
                self.warnings.append(
                    f"kid subsets hold {size} pictures, not {settings.kid_subset_size}: a set is smaller"
                )
            mean, std = scores.kernel_distance(
                samples, real, subsets=settings.kid_subsets, subset_size=size, seed=settings.seed
            )
            values |= {extractor.score_name("kid"): mean, f"{extractor.score_name('kid')}_std": std}
        if "prc" in self.active:
            if fewest <= settings.prc_neighborhood:
                raise UserError(
                    f"metric prc needs more than evaluation.prc_neighborhood={settings.prc_neighborhood} pictures in "
                    f"each set; one has {fewest}"
                )
            precision, recall = scores.precision_recall(samples, real, neighborhood=settings.prc_neighborhood)
            values |= {extractor.score_name("precision"): precision, extractor.score_name("recall"): recall}
        return values

    def _logit_scores(self, samples: Collected) -> dict[str, float]:
        values: dict[str, float] = {}
        if samples.logits is None:
            return values
        assert self.extractor is not None
        if "isc" in self.active:
            if samples.count < self.settings.isc_splits:
                raise UserError(
                    f"metric isc: {samples.count} samples cannot fill {self.settings.isc_splits} isc_splits"
                )
            mean, std = scores.inception_score(samples.logits, splits=self.settings.isc_splits, seed=self.settings.seed)
            values |= {self.extractor.score_name("is"): mean, f"{self.extractor.score_name('is')}_std": std}
        if "accuracy" in self.active:
            assert samples.labels is not None
            values["class_accuracy"] = float((samples.logits.argmax(1) == samples.labels).double().mean())
        return values

    def _pixel_checks(self, samples: Collected, splits: list[Collected], saved: dict[str, str]) -> dict[str, float]:
        training, held_out = splits
        assert samples.pictures is not None
        assert training.pictures is not None
        assert held_out.pictures is not None
        if not samples.size == training.size == held_out.size:
            raise UserError(
                f"metrics classifier and nearest compare pixels, but samples are {samples.size[1]}x{samples.size[0]}, "
                f"the reference is {training.size[1]}x{training.size[0]}; choose a data set of the samples' size"
            )
        values: dict[str, float] = {}
        if "classifier" in self.active:
            assert samples.labels is not None
            assert training.labels is not None
            assert held_out.labels is not None
            values |= classifier_accuracy(
                LabelledPictures(training.pictures, training.labels),
                LabelledPictures(held_out.pictures, held_out.labels),
                LabelledPictures(samples.pictures, samples.labels),
                shift=self.settings.shift,
            )
        if "nearest" in self.active:
            result = nearest_neighbours(
                samples.pictures, training.pictures, held_out.pictures, shift=self.settings.shift
            )
            values |= result.metrics
            path = save_nearest(result, samples.pictures, training.pictures, self.picture)
            saved["closest samples, each beside its nearest training picture"] = str(path)
        return values

    def _result(self, samples: Collected, values: dict[str, float], saved: dict[str, str]) -> dict:
        reference = self.reference
        return {
            "metrics": values,
            "n_samples": samples.count,
            "n_reference": len(reference.pictures),
            "label_histogram": label_histogram(samples.labels),
            "dataset": {
                "reference": reference.pictures.name,
                "training": len(reference.training),
                "held_out": len(reference.held_out),
                "split": reference.split,
                "resolution": list(samples.size),
            },
            "source": "memory" if isinstance(self.samples, Generation) else self.samples.kind,
            "sampling": self.samples.describe() if isinstance(self.samples, Generation) else self.samples.origin,
            "pictures_saved": saved,
        }
