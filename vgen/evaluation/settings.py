"""What an evaluation computes and with which conventions, checked before any work."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vgen.errors import UserError

FEATURE_METRICS = ("fd", "fid", "isc", "kid", "prc", "accuracy")
SAMPLE_METRICS = (*FEATURE_METRICS, "classifier", "nearest")
RECONSTRUCTION_METRICS = ("psnr", "ssim", "codebook", "fd", "fid")
ALL_METRICS = tuple(dict.fromkeys(SAMPLE_METRICS + RECONSTRUCTION_METRICS))


@dataclass(frozen=True)
class EvaluationSettings:
    """The config group ``evaluation``.

    Attributes:
        metrics: names out of :data:`ALL_METRICS`; those of the other job are left out and named in the report.
        features: ``inception``, the path of a TorchScript extractor, or None for metrics that need no extractor.
        features_name: name of the scores of a TorchScript extractor; its file stem when None.
        weights: file or folder of the Inception weights; the usual places when None.
        batch_size: pictures per forward pass of a process.
        isc_splits: splits of the Inception score.
        kid_subsets: random subsets of the kernel distance.
        kid_subset_size: pictures per subset.
        prc_neighborhood: k of precision and recall.
        shift: pixels by which augmentation moves training pictures: the classifier learns moved pictures too, and the
            nearest-neighbour check finds moved copies.
        seed: of shuffles, subsets and splits (2020 is torch-fidelity's).
    """

    metrics: Sequence[str]
    features: str | None
    features_name: str | None
    weights: str | None
    batch_size: int
    isc_splits: int
    kid_subsets: int
    kid_subset_size: int
    prc_neighborhood: int
    shift: int
    seed: int

    def __post_init__(self):
        if isinstance(self.metrics, str):
            raise UserError(
                f"evaluation.metrics={self.metrics} must be a list, for example evaluation.metrics=[fd,kid]"
            )
        object.__setattr__(self, "metrics", tuple(self.metrics))
        unknown = [m for m in self.metrics if m not in ALL_METRICS]
        if unknown or not self.metrics:
            what = f"has unknown {', '.join(map(str, unknown))}" if unknown else "is empty"
            raise UserError(f"evaluation.metrics {what}; choose from {', '.join(ALL_METRICS)}")
        smallest = {"kid_subset_size": 2, "seed": 0, "shift": 0}
        whole = (
            "batch_size",
            "isc_splits",
            "kid_subsets",
            "kid_subset_size",
            "prc_neighborhood",
            "shift",
            "seed",
        )
        for key in whole:
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest.get(key, 1):
                raise UserError(f"evaluation.{key}={value} must be a whole number of at least {smallest.get(key, 1)}")
        needing = [m for m in self.metrics if m in FEATURE_METRICS]
        if self.features is None and needing:
            raise UserError(
                f"evaluation.metrics asks for {', '.join(needing)} but evaluation.features is not set; "
                f"use features=inception or the path of a TorchScript extractor"
            )
        if self.features not in (None, "inception") and "fid" in self.metrics:
            raise UserError(
                "metric fid is that of evaluation.features=inception only; with another extractor ask for fd"
            )

    @property
    def wants_frechet(self) -> bool:
        """Whether a Frechet distance is asked for."""
        return "fd" in self.metrics or "fid" in self.metrics

    def estimator(self) -> dict:
        """Options of the estimators, as a report records them."""
        options = asdict(self)
        keys = ("isc_splits", "kid_subsets", "kid_subset_size", "prc_neighborhood", "shift", "seed")
        return {
            "covariance_divisor": "n-1",
            "frechet": "float64 eigendecomposition",
            "isc_shuffle": True,
            **{key: options[key] for key in keys},
        }
