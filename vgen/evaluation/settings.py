"""What an evaluation computes and with which conventions, checked before any work."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from vgen.errors import UserError
from vgen.evaluation.fvd import fvd_variant
from vgen.evaluation.pixel_metrics import SSIM_CONVENTIONS
from vgen.evaluation.protocol import Protocol
from vgen.evaluation.quantise import QUANTISE_RULES
from vgen.evaluation.resize import RESIZE_MODES
from vgen.evaluation.video_files import ClipChoice

FEATURE_METRICS = ("fd", "fid", "sfid", "isc", "kid", "mind", "prc", "prdc", "accuracy")
CLIP_METRICS = ("fvd", "kvd")
SAMPLE_METRICS = (*FEATURE_METRICS, *CLIP_METRICS, "clip_score", "classifier", "nearest")
RECONSTRUCTION_METRICS = ("psnr", "ssim", "lpips", "codebook", "fd", "fid", "sfid", "fvd")
ALL_METRICS = tuple(dict.fromkeys(SAMPLE_METRICS + RECONSTRUCTION_METRICS))
DISTANCES = ("fd", "fid", "sfid", "fvd")
Dialect = Literal["torch-fidelity", "adm"]
DIALECTS = {
    "torch-fidelity": "torch-fidelity 0.4: Inception score of shuffled rows in splits, precision/recall in float32",
    "adm": "ADM suite: Inception score of blocks of rows in file order, precision/recall from squared distances",
}


@dataclass(frozen=True)
class EvaluationSettings:
    """The config group ``evaluation``.

    Attributes:
        metrics: names out of :data:`ALL_METRICS`; those of the other job are left out and named in the report.
        dialect: whose conventions Inception score, precision and recall follow, see :data:`DIALECTS`. The network, its
            resize and the Frechet distance are the same in both.
        features: ``inception``, ``vgg16``, a registered name or the path of a TorchScript extractor; for clips the path
            of a TorchScript stand-in for I3D. None takes the network of the literature where a metric has one.
        features_name: name of the scores of a TorchScript extractor; its file stem when None.
        resize_mode: how Inception gets its 299 pixels; other than ``tf1_bilinear`` the scores get another name.
        weights: file or folder of published weights; the usual places when None.
        allow_unverified: accept weights of another hash; their scores carry another name.
        batch_size: pictures per forward pass of a process.
        clip_batch_size: clips per forward pass of a process.
        isc_splits: splits of torch-fidelity's Inception score.
        isc_split_size: rows per block of the ADM suite's Inception score.
        kid_subsets: random subsets of the kernel distance.
        kid_subset_size: pictures per subset.
        prc_neighborhood: k of precision and recall.
        prc_half: compute the ADM suite's distances in float16, as its published figures were.
        prdc_neighborhood: k of density and coverage.
        ssim: convention of the structural similarity.
        quantise: how the pictures of a tokenizer under test become 8-bit (:func:`vgen.evaluation.quantise.quantise`);
            other rules than ``round`` are for comparing with code that truncates.
        clip_model: folder with a local copy of a CLIP repository of the hub, for ``clip_score``.
        fvd_variant: whose Frechet video distance.
        clips: which frames of video files make a clip; None where no video files are read.
        shift: pixels by which augmentation moves training pictures: the classifier learns moved pictures too, and the
            nearest-neighbour check finds moved copies.
        seed: of shuffles, subsets and splits (2020 is torch-fidelity's).
        cache: folder of reference statistics, found again by the content of the reference; None computes them anew.
        protocol: whose measurement is followed, None for none.
    """

    metrics: Sequence[str]
    dialect: Dialect
    features: str | None
    features_name: str | None
    resize_mode: str
    weights: str | None
    allow_unverified: bool
    batch_size: int
    clip_batch_size: int
    isc_splits: int
    isc_split_size: int
    kid_subsets: int
    kid_subset_size: int
    prc_neighborhood: int
    prc_half: bool
    prdc_neighborhood: int
    ssim: str
    quantise: str
    clip_model: str | None
    fvd_variant: str
    clips: ClipChoice | None
    shift: int
    seed: int
    cache: str | None
    protocol: Protocol | None

    def __post_init__(self) -> None:
        if isinstance(self.metrics, str):
            raise UserError(
                f"evaluation.metrics={self.metrics} must be a list, for example evaluation.metrics=[fd,kid]"
            )
        object.__setattr__(self, "metrics", tuple(self.metrics))
        unknown = [m for m in self.metrics if m not in ALL_METRICS]
        if unknown or not self.metrics:
            what = f"has unknown {', '.join(map(str, unknown))}" if unknown else "is empty"
            raise UserError(f"evaluation.metrics {what}; choose from {', '.join(ALL_METRICS)}")
        self._check_numbers()
        choices = {
            "dialect": get_args(Dialect),
            "resize_mode": RESIZE_MODES,
            "ssim": tuple(SSIM_CONVENTIONS),
            "quantise": QUANTISE_RULES,
        }
        for key, names in choices.items():
            if getattr(self, key) not in names:
                raise UserError(f"evaluation.{key}={getattr(self, key)} is unknown; choose one of {', '.join(names)}")
        fvd_variant(self.fvd_variant)
        if "clip_score" in self.metrics and self.clip_model is None:
            raise UserError(
                "metric clip_score needs evaluation.clip_model=<folder with a copy of openai/clip-vit-base-patch32>"
            )
        needing = [m for m in ("fd", "accuracy") if m in self.metrics]
        if self.features is None and needing:
            raise UserError(
                f"evaluation.metrics asks for {', '.join(needing)} but evaluation.features is not set; "
                f"use features=inception or the path of a TorchScript extractor"
            )
        published = [m for m in ("fid", "sfid") if m in self.metrics]
        if self.features not in (None, "inception") and published:
            raise UserError(
                f"metric {published[0]} is that of evaluation.features=inception only; with another extractor ask for "
                f"fd"
            )

    def _check_numbers(self) -> None:
        smallest = {"kid_subset_size": 2, "seed": 0, "shift": 0}
        for key in (
            *("batch_size", "clip_batch_size", "isc_splits", "isc_split_size", "kid_subsets", "kid_subset_size"),
            *("prc_neighborhood", "prdc_neighborhood", "shift", "seed"),
        ):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest.get(key, 1):
                raise UserError(f"evaluation.{key}={value} must be a whole number of at least {smallest.get(key, 1)}")

    @property
    def wants_frechet(self) -> bool:
        """Whether a Frechet distance of pooled picture features is asked for."""
        return "fd" in self.metrics or "fid" in self.metrics

    @property
    def picture_features(self) -> str | None:
        """The picture extractor the metrics need, None if they need none."""
        if not set(self.metrics) & set(FEATURE_METRICS):
            return None
        return self.features or "inception"

    def estimator(self) -> dict:
        """Options of the estimators, as a report records them."""
        options = asdict(self)
        keys = ("kid_subsets", "kid_subset_size", "prc_neighborhood", "prdc_neighborhood", "ssim", "shift", "seed")
        adm = self.dialect == "adm"
        return {
            "dialect": self.dialect,
            "conventions": DIALECTS[self.dialect],
            "covariance_divisor": "n-1",
            "frechet": "float64, from the samples where they are fewer than the dimensions",
            "isc_shuffle": not adm,
            "isc_splits": None if adm else self.isc_splits,
            "isc_split_size": self.isc_split_size if adm else None,
            "prc_half": adm and self.prc_half,
            **{key: options[key] for key in keys},
        }
