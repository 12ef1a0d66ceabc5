"""Scores of two collected sets: distances, kernel scores, precision and recall, scores of logits."""

from dataclasses import dataclass, field

from torch import Tensor

from vgen.errors import UserError
from vgen.evaluation import metrics as scores
from vgen.evaluation.adm import adm_inception_score, adm_precision_recall, class_mixed
from vgen.evaluation.clip_features import ClipExtractor
from vgen.evaluation.collect import AnyExtractor, Collected
from vgen.evaluation.frechet import Gaussian, frechet_distance
from vgen.evaluation.manifold import precision_recall_density_coverage
from vgen.evaluation.settings import EvaluationSettings
from vgen.evaluation.statistics import SetStatistics


@dataclass
class FeatureScores:
    """Computes the active metrics on process 0.

    Attributes:
        extractor: that made the features.
        settings: conventions.
        active: metrics asked for that apply.
        warnings: remarks for the report, added to.
    """

    extractor: AnyExtractor
    settings: EvaluationSettings
    active: list[str]
    warnings: list[str]
    values: dict[str, float] = field(default_factory=dict)

    def name(self, score: str) -> str:
        """Name of a score with this extractor."""
        return self.extractor.score_name(score)

    def distances(self, samples: Collected, real: SetStatistics, prefix: str = "") -> None:
        """Frechet distances of pooled and spatial features; ``prefix`` r is for reconstructions."""
        made = samples.statistics
        assert made is not None
        if set(self.active) & {"fd", "fid", "fvd"}:
            score = "fvd" if isinstance(self.extractor, ClipExtractor) else "fd"
            self._distance(self.name(f"{prefix}{score}"), made.pool, real.pool)
        if "sfid" in self.active:
            assert made.spatial is not None
            if real.spatial is None:
                raise UserError("metric sfid needs mu_s and sigma_s in the reference file; it has mu and sigma only")
            self._distance(self.name(f"{prefix}sfd"), made.spatial, real.spatial)

    def _distance(self, name: str, made: Gaussian, real: Gaussian) -> None:
        self.values[name] = frechet_distance(made, real)
        fewest = min(made.count, real.count or made.count)
        if fewest <= made.dim:
            self.warnings.append(
                f"{name}: {fewest} samples are fewer than the {made.dim} feature dimensions need: the covariance is "
                f"singular and the Frechet distance strongly biased"
            )

    def of_features(self, samples: Tensor, real: Tensor) -> None:
        """Kernel distance, precision, recall, density and coverage of features [n, d] and [m, d]."""
        settings, fewest = self.settings, min(len(samples), len(real))
        if "kid" in self.active:
            size = min(settings.kid_subset_size, fewest)
            if size < settings.kid_subset_size:
                self.warnings.append(
                    f"kid subsets hold {size} pictures, not {settings.kid_subset_size}: a set is smaller"
                )
            mean, std = scores.kernel_distance(
                samples, real, subsets=settings.kid_subsets, subset_size=size, seed=settings.seed
            )
            self.values |= {self.name("kid"): mean, f"{self.name('kid')}_std": std}
        if "mind" in self.active:
            self.values[self.name("mind")] = scores.sliced_distance(samples, real, seed=settings.seed)
        if "kvd" in self.active:
            self.values[self.name("kvd")] = scores.squared_mmd(samples, real)
        for metric, k in (("prc", settings.prc_neighborhood), ("prdc", settings.prdc_neighborhood)):
            if metric in self.active and fewest <= k:
                raise UserError(
                    f"metric {metric} needs more than evaluation.{metric}_neighborhood={k} pictures in each set; one "
                    f"has {fewest}"
                )
        if "prc" in self.active:
            self._precision_recall(samples, real)
        if "prdc" in self.active:
            four = precision_recall_density_coverage(samples, real, k=settings.prdc_neighborhood)
            self.values |= {self.name(key): four[key] for key in ("density", "coverage")}

    def _precision_recall(self, samples: Tensor, real: Tensor) -> None:
        settings, k = self.settings, self.settings.prc_neighborhood
        if settings.dialect == "adm":
            precision, recall = adm_precision_recall(samples, real, k=k, half=settings.prc_half)
        else:
            precision, recall = scores.precision_recall(samples, real, neighborhood=k)
        self.values |= {self.name("precision"): precision, self.name("recall"): recall}

    def of_logits(self, logits: Tensor, labels: Tensor | None) -> None:
        """Inception score and class accuracy of logits [n, classes]."""
        if "isc" in self.active:
            self._inception_score(logits, labels)
        if "accuracy" in self.active:
            assert labels is not None
            self.values["class_accuracy"] = float((logits.argmax(1) == labels).double().mean())

    def _inception_score(self, logits: Tensor, labels: Tensor | None) -> None:
        settings = self.settings
        if settings.dialect == "adm":
            if labels is not None and not class_mixed(labels, split_size=settings.isc_split_size):
                self.warnings.append(
                    "the samples are sorted by class: the ADM suite's Inception score takes consecutive blocks of "
                    f"{settings.isc_split_size}, which then hold few classes; mix the order"
                )
            self.values[self.name("is")] = adm_inception_score(logits, split_size=settings.isc_split_size)
            return
        if len(logits) < settings.isc_splits:
            raise UserError(f"metric isc: {len(logits)} samples cannot fill {settings.isc_splits} isc_splits")
        mean, std = scores.inception_score(logits, splits=settings.isc_splits, seed=settings.seed)
        self.values |= {self.name("is"): mean, f"{self.name('is')}_std": std}
