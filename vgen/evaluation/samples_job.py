"""Score a set of samples against real pictures or clips."""

from dataclasses import dataclass, field
from pathlib import Path

from vgen.errors import UserError
from vgen.evaluation.captions import mean_clip_score
from vgen.evaluation.classifier import LabelledPictures, classifier_accuracy
from vgen.evaluation.clip_score import ClipScorer
from vgen.evaluation.collect import AnyExtractor, Collected, Wanted, collect, read_batches
from vgen.evaluation.feature_scores import FeatureScores
from vgen.evaluation.features import Extractor
from vgen.evaluation.generation import Generation
from vgen.evaluation.nearest import nearest_neighbours, save_nearest
from vgen.evaluation.pictures import Pictures
from vgen.evaluation.real_side import RealSide, batch_size, measure_reference
from vgen.evaluation.report import label_histogram
from vgen.evaluation.settings import CLIP_METRICS, SAMPLE_METRICS, EvaluationSettings
from vgen.evaluation.sources import Reference
from vgen.processes import Processes

REAL_FEATURES = {"kid", "kvd", "mind", "prc", "prdc"}


@dataclass
class SamplesJob:
    """Samples against a reference.

    Attributes:
        samples: stored pictures or clips, or a generator to draw them from.
        reference: the real side.
        settings: metrics and conventions.
        extractor: feature extractor, if a metric needs one.
        picture: where to write the nearest-neighbour picture.
        captions: of the samples, and the network that compares them, if CLIP score is asked for.
        skipped: metrics that do not apply, with the reason; filled when the job is made.
        warnings: remarks for the report.
    """

    samples: Pictures | Generation
    reference: Reference
    settings: EvaluationSettings
    extractor: AnyExtractor | None
    picture: Path
    captions: tuple[list[str], ClipScorer] | None = None
    warnings: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.skipped = self._inapplicable()
        self.active = [m for m in self.settings.metrics if m not in self.skipped]
        if not self.active:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
            raise UserError(f"evaluation.metrics: none of them applies to these samples ({reasons})")
        self._check_labels()
        self._check_reference()

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.samples.labels) if isinstance(self.samples, Generation) else len(self.samples)

    def _inapplicable(self) -> dict[str, str]:
        reasons = {m: "needs job=reconstruction" for m in self.settings.metrics if m not in SAMPLE_METRICS}
        clips = self.samples.frames is not None
        others = set(SAMPLE_METRICS) - set(CLIP_METRICS) if clips else set(CLIP_METRICS)
        what = "clips" if clips else "pictures"
        reasons |= {m: f"the samples are {what}" for m in self.settings.metrics if m in others}
        logits = isinstance(self.extractor, Extractor) and self.extractor.classes is not None
        missing = {
            "isc": None if logits else "the extractor returns no logits",
            "sfid": None if getattr(self.extractor, "spatial_dim", None) else "the extractor has no spatial features",
            "accuracy": None if logits else "the extractor returns no logits",
        }
        for metric, reason in missing.items():
            if reason and metric in self.settings.metrics:
                reasons.setdefault(metric, reason)
        if (
            "accuracy" in self.settings.metrics
            and isinstance(self.extractor, Extractor)
            and self.extractor.is_inception
        ):
            reasons["accuracy"] = "the classes of the Inception network are not those of the data"
        if "clip_score" in self.settings.metrics and self.captions is None:
            reasons.setdefault("clip_score", "needs captions=<file with one caption per sample>")
        for metric in ("accuracy", "classifier"):
            if metric in self.settings.metrics and self.samples.labels is None:
                reasons[metric] = "the samples carry no labels"
        pictures = self.reference.pictures
        for metric in ("classifier", "nearest"):
            if metric in self.settings.metrics and pictures is None:
                reasons[metric] = "the reference holds statistics only"
        if "classifier" in self.settings.metrics and pictures is not None and pictures.labels is None:
            reasons["classifier"] = "the reference carries no labels"
        return reasons

    def _check_labels(self) -> None:
        labels = self.samples.labels
        if labels is None:
            return
        known = {}
        if "accuracy" in self.active and isinstance(self.extractor, Extractor):
            known["the extractor"] = self.extractor.classes or 0
        pictures = self.reference.pictures
        if "classifier" in self.active and pictures is not None and pictures.labels is not None:
            known["the reference"] = int(pictures.labels.max()) + 1
        for who, classes in known.items():
            if int(labels.min()) < 0 or int(labels.max()) >= classes:
                bad = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
                raise UserError(f"samples carry the label {bad} but {who} knows the classes 0..{classes - 1}")

    def _check_reference(self) -> None:
        pictures = self.reference.pictures
        if pictures is None:
            if REAL_FEATURES & set(self.active):
                names = ", ".join(sorted(REAL_FEATURES & set(self.active)))
                raise UserError(
                    f"reference={self.reference.name} holds statistics only, but {names} need pictures; give a "
                    f"reference with pictures or leave them out of evaluation.metrics"
                )
        elif pictures.frames != self.samples.frames:
            shown = [
                "pictures" if f is None else f"clips of {f} frames" for f in (self.samples.frames, pictures.frames)
            ]
            raise UserError(f"the samples are {shown[0]} but the reference {pictures.name} holds {shown[1]}")
        if self.extractor is not None:
            self.reference.check_width(self.extractor.dim, self.extractor.name)

    def run(self, processes: Processes) -> dict:
        """Compute the metrics; the result is complete on process 0.

        Returns:
            The parts of the report that this job knows.
        """
        wants = set(self.active)
        fits = Wanted(gaussian=bool(wants & {"fd", "fid", "fvd", "sfid"}), spatial="sfid" in wants)
        wanted = Wanted(
            gaussian=fits.gaussian,
            spatial=fits.spatial,
            features=bool(wants & REAL_FEATURES),
            logits=bool(wants & {"isc", "accuracy"}),
            pictures=bool(wants & {"classifier", "nearest"}),
        )
        pictures = self.samples.draw(processes) if isinstance(self.samples, Generation) else self.samples
        samples = self._read(pictures, wanted, processes, "samples")
        real = None
        if fits.gaussian or wanted.features:
            assert self.extractor is not None
            real = measure_reference(
                self.reference,
                Wanted(gaussian=fits.gaussian, spatial=fits.spatial, features=wanted.features),
                extractor=self.extractor,
                processes=processes,
                size=batch_size(self.settings, pictures),
                cache=self.settings.cache,
                warnings=self.warnings,
            )
        values: dict[str, float] = {}
        if "clip_score" in self.active and self.captions is not None:
            values["clip_score"] = mean_clip_score(
                pictures, *self.captions, batch_size=self.settings.batch_size, processes=processes
            )
        saved: dict[str, str] = {}
        splits = None
        if wanted.pictures:
            parts = {"training part": self.reference.training, "held-out part": self.reference.held_out}
            splits = [self._read(part, Wanted(pictures=True), processes, name) for name, part in parts.items() if part]
        if processes.rank == 0:
            values |= self._feature_values(samples, real)
            if splits is not None:
                values |= self._pixel_checks(samples, splits, saved)
        return self._result(pictures, samples, real, values, saved)

    def _read(self, pictures: Pictures, wanted: Wanted, processes: Processes, description: str) -> Collected:
        batches = read_batches(
            pictures, batch_size=batch_size(self.settings, pictures), processes=processes, description=description
        )
        collected = collect(
            batches,
            total=len(pictures),
            wanted=wanted,
            extractor=self.extractor,
            processes=processes,
            name=pictures.name,
        )
        if collected.remark:
            self.warnings.append(collected.remark)
        return collected

    def _feature_values(self, samples: Collected, real: RealSide | None) -> dict[str, float]:
        if self.extractor is None:
            return {}
        scores = FeatureScores(self.extractor, self.settings, self.active, self.warnings)
        if real is not None:
            if real.size is not None and real.size != samples.size:
                self.warnings.append(
                    f"samples are {samples.size[1]}x{samples.size[0]}, the reference {real.size[1]}x{real.size[0]}; "
                    f"the extractor resized both"
                )
            if real.statistics is not None:
                scores.distances(samples, real.statistics)
            if real.features is not None:
                assert samples.features is not None
                scores.of_features(samples.features, real.features)
        if samples.logits is not None:
            scores.of_logits(samples.logits, samples.labels)
        return scores.values

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

    def _result(
        self,
        pictures: Pictures,
        samples: Collected,
        real: RealSide | None,
        values: dict[str, float],
        saved: dict[str, str],
    ) -> dict:
        reference = self.reference
        return {
            "metrics": values,
            "n_samples": samples.count,
            "n_reference": reference.count,
            "label_histogram": label_histogram(samples.labels),
            "dataset": {
                "reference": reference.name,
                "reference_sha256": reference.sha256,
                "statistics": None if real is None else real.origin,
                "training": None if reference.training is None else len(reference.training),
                "held_out": None if reference.held_out is None else len(reference.held_out),
                "split": reference.split,
                "resolution": list(samples.size),
                "clip_frames": pictures.frames,
            },
            "source": pictures.kind,
            "sampling": self.samples.describe(pictures) if isinstance(self.samples, Generation) else pictures.origin,
            "clip_model": None if self.captions is None else self.captions[1].describe(),
            "pictures_saved": saved,
        }
