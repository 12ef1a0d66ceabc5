"""From the configuration of evaluate.py to a written report."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vgen.checkpoints.release import build, load_tokenizer
from vgen.data.source import DataSource
from vgen.errors import UserError
from vgen.evaluation.features import Extractor, load_extractor
from vgen.evaluation.generation import Generation, is_release, release_kind
from vgen.evaluation.pictures import Pictures
from vgen.evaluation.reconstruction_job import ReconstructionJob
from vgen.evaluation.report import print_report, provenance, writable_report, write_report
from vgen.evaluation.samples_job import SamplesJob
from vgen.evaluation.settings import FEATURE_METRICS, EvaluationSettings
from vgen.evaluation.sources import open_reference, open_set, take
from vgen.processes import joined
from vgen.runtime import pick_device, pick_dtype, rank
from vgen.sampling.settings import Sampling

PUBLISHED_SAMPLES = 50_000
JOBS = ("auto", "samples", "reconstruction")


def pick_job(config: DictConfig) -> str:
    """Which job the configuration describes: ``samples`` or ``reconstruction``.

    Raises:
        UserError: if it is ambiguous, or what is to be scored is missing or does not fit the job.
    """
    if config.job not in JOBS:
        raise UserError(f"job={config.job} is unknown; choose one of {', '.join(JOBS)}")
    given = [key for key in ("samples", "checkpoint") if config[key] is not None]
    if len(given) != 1:
        raise UserError(
            f"{'both samples= and checkpoint= are given' if given else 'nothing to score'}; give either "
            f"samples=<folder or .npz> or checkpoint=<release folder of a generator or a tokenizer>"
        )
    kind = release_kind(Path(str(config.checkpoint)).expanduser()) if given == ["checkpoint"] else "samples"
    if config.job == "reconstruction" and kind == "samples":
        raise UserError("job=reconstruction needs checkpoint=<release folder of a tokenizer>")
    if config.job == "samples" and kind == "tokenizer":
        raise UserError(f"checkpoint={config.checkpoint} is a tokenizer and draws no samples; use job=reconstruction")
    if config.job != "auto":
        return str(config.job)
    return "reconstruction" if kind == "tokenizer" else "samples"


def _container(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node


def _load_source(config: DictConfig) -> DataSource | None:
    if config.get("data") is None:
        return None
    source = build(_container(config.data))
    if not isinstance(source, DataSource):
        raise UserError(
            "evaluation scores pixels, but data= holds cached codes; choose the data set of pictures itself"
        )
    return source


def _load_extractor(settings: EvaluationSettings, device: torch.device) -> Extractor | None:
    if settings.features is None or not set(settings.metrics) & set(FEATURE_METRICS):
        return None
    return load_extractor(settings.features, name=settings.features_name, weights=settings.weights, device=device)


def _output(config: DictConfig, scored: str) -> Path:
    return writable_report(
        config.out if config.out is not None else f"{scored.rstrip('/').removesuffix('.npz')}.report.json"
    )


def _open_samples(
    config: DictConfig, source: DataSource | None, device: torch.device
) -> tuple[Pictures | Generation, list[str]]:
    where = str(config.checkpoint or config.samples)
    folder = Path(where).expanduser()
    if config.checkpoint is not None or is_release(folder):
        generation = Generation.load(
            folder,
            count=config.num_samples,
            labels=str(config.labels),
            sampling=_sampling(config),
            batch_size=config.sample_batch_size,
            device=device,
            dtype=pick_dtype(config.dtype),
            schedule=_container(config.get("schedule")),
        )
        return generation, []
    pictures = open_set(where, key="samples", source=source)
    return take(pictures, config.num_samples, key="samples")


def _sampling(config: DictConfig) -> Sampling:
    sampling = build(_container(config.sampling))
    assert isinstance(sampling, Sampling), type(sampling)
    return sampling


def _check_counts(config: DictConfig) -> None:
    for key in ("num_samples", "sample_batch_size"):
        value = config[key]
        if value is None and key == "num_samples":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key}={value} must be a whole number of at least 1")


def make_job(config: DictConfig, settings: EvaluationSettings, out: Path) -> SamplesJob | ReconstructionJob:
    """Load everything a job needs; every mistake of the user shows here, before any work.

    Raises:
        UserError: for whatever is missing or does not fit.
    """
    device = pick_device(config.device)
    extractor = _load_extractor(settings, device)
    source = _load_source(config)
    stem = out.with_suffix("")
    if pick_job(config) == "samples":
        samples, warnings = _open_samples(config, source, device)
        reference = open_reference(str(config.reference), source=source, seed=settings.seed)
        picture = stem.with_name(f"{stem.name}_nearest.png")
        return SamplesJob(samples, reference, settings, extractor, picture, warnings)
    where = "data.val" if config.reference in (None, "data") else str(config.reference)
    originals, warnings = take(open_set(where, key="reference", source=source), config.num_samples, key="reference")
    picture = stem.with_name(f"{stem.name}_reconstructions.png")
    frechet_extractor = extractor if settings.wants_frechet else None
    tokenizer = load_tokenizer(Path(str(config.checkpoint)).expanduser())
    return ReconstructionJob(tokenizer, originals, settings, frechet_extractor, device, picture, warnings)


def evaluate(config: DictConfig) -> dict:
    """Run the evaluation a configuration describes and write its report.

    Args:
        config: composed ``configs/evaluate.yaml``.

    Returns:
        The report; complete on process 0.

    Raises:
        UserError: for anything the user can mend, before the scoring starts where it can be known then.
    """
    start = datetime.now(UTC)
    name = pick_job(config)
    _check_counts(config)
    settings = build(_container(config.evaluation))
    assert isinstance(settings, EvaluationSettings), type(settings)
    out = _output(config, str(config.checkpoint or config.samples))
    job = make_job(config, settings, out)
    with joined(pick_device(config.device)) as processes:
        result = job.run(processes)
    extractor = job.extractor
    source = result.pop("source")
    why_not = _why_not_comparable(extractor, result["n_samples"])
    report = {
        "job": name,
        **result,
        "comparable_with_published": not why_not,
        "why_not": why_not,
        "extractor": extractor.describe() if extractor else None,
        "pixels": {
            "source": source,
            "quantise": "round half up",
            "resize_mode": extractor.resize_mode if extractor else None,
        },
        "estimator": settings.estimator(),
        "provenance": provenance(_container(config), seed=settings.seed, world_size=processes.world_size, start=start),
        "skipped": job.skipped,
        "warnings": job.warnings,
    }
    if rank() == 0:
        write_report(report, out)
        print_report(report, out)
    return report


def _why_not_comparable(extractor: Extractor | None, count: int) -> list[str]:
    """What keeps the scores from being set beside published ones; empty if nothing does."""
    if extractor is None:
        return ["no score of the literature was computed"]
    reasons = [] if extractor.is_inception else [f"the extractor is {extractor.name}"]
    if count != PUBLISHED_SAMPLES:
        reasons.append(f"{count} samples, published figures use {PUBLISHED_SAMPLES}")
    return reasons
