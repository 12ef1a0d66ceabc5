"""From the configuration of evaluate.py to a written report."""

import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vgen.checkpoints.release import WEIGHTS, build, file_sha256, load_tokenizer
from vgen.data.source import DataSource
from vgen.errors import UserError
from vgen.evaluation.captions import read_captions
from vgen.evaluation.clip_features import ClipExtractor
from vgen.evaluation.clip_score import ClipScorer, load_clip
from vgen.evaluation.collect import AnyExtractor, conventions
from vgen.evaluation.extractors import clip_extractor, picture_extractor, published, reconstruction_networks
from vgen.evaluation.features import Extractor
from vgen.evaluation.generation import Generation, is_release, release_kind
from vgen.evaluation.pictures import Pictures
from vgen.evaluation.real_side import batch_size
from vgen.evaluation.reconstruction_job import ReconstructionJob
from vgen.evaluation.report import print_report, provenance, writable_report, write_report
from vgen.evaluation.samples_job import SamplesJob
from vgen.evaluation.settings import EvaluationSettings
from vgen.evaluation.sources import open_reference, open_set, take
from vgen.evaluation.statistics_job import measure_statistics
from vgen.evaluation.table import job_folder, write_table
from vgen.processes import joined
from vgen.runtime import pick_device, pick_dtype, rank
from vgen.sampling.settings import Sampling

JOBS = ("auto", "samples", "reconstruction", "statistics")


def pick_job(config: DictConfig) -> str:
    """Which job the configuration describes: ``samples``, ``reconstruction`` or ``statistics``.

    Raises:
        UserError: if it is ambiguous, or what is to be scored is missing or does not fit the job.
    """
    if config.job not in JOBS:
        raise UserError(f"job={config.job} is unknown; choose one of {', '.join(JOBS)}")
    given = [key for key in ("samples", "checkpoint") if config[key] is not None]
    if len(given) != 1:
        raise UserError(
            f"{'both samples= and checkpoint= are given' if given else 'nothing to score'}; give either "
            f"samples=<folder or file> or checkpoint=<release folder of a generator or a tokenizer>"
        )
    kind = release_kind(Path(str(config.checkpoint)).expanduser()) if given == ["checkpoint"] else "samples"
    if config.job == "reconstruction" and kind == "generator":
        raise UserError("job=reconstruction needs the release folder of a tokenizer, or samples=<reconstructions>")
    if config.job == "statistics" and kind != "samples":
        raise UserError("job=statistics needs samples=<the set to measure>; to score a generator leave job out")
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


def load_settings(config: DictConfig) -> EvaluationSettings:
    """The config group ``evaluation`` with the short form ``metrics=[...]`` folded in.

    Raises:
        UserError: naming the key that is wrong.
    """
    node = _container(config.evaluation)
    if config.get("metrics") is not None:
        node["metrics"] = _container(config.metrics)
    settings = build(node)
    assert isinstance(settings, EvaluationSettings), type(settings)
    return settings


def _output(config: DictConfig, scored: str) -> Path:
    """Where the report goes: in a multirun a folder per job below ``out``, the folder of the table."""
    if _multirun():
        return writable_report(job_folder(_sweep_folder(config)) / "report.json")
    stem = f"{scored.rstrip('/').removesuffix('.npz')}.report.json"
    return writable_report(config.out if config.out is not None else stem)


def _multirun() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _sweep_folder(config: DictConfig) -> Path:
    return Path(str(config.out if config.out is not None else HydraConfig.get().sweep.dir)).expanduser()


def _generation(config: DictConfig, settings: EvaluationSettings, folder: Path, out: Path) -> Generation:
    sampling = _container(config.sampling)
    built = build(sampling)
    assert isinstance(built, Sampling), type(built)
    protocol = settings.protocol
    labels = config.labels or (protocol.labels if protocol else None) or "balanced"
    return Generation.load(
        folder,
        samples=out.with_name(f"{out.name.removesuffix('.json').removesuffix('.report')}_samples"),
        count=config.num_samples or (protocol.num_samples if protocol else None),
        labels=str(labels),
        sampling=sampling,
        settings=built,
        batch_size=config.sample_batch_size,
        device=pick_device(config.device),
        dtype=pick_dtype(config.dtype),
        schedule=_container(config.get("schedule")),
        picture_size=config.picture_size,
        num_tokens=config.num_tokens,
        text_features=config.text_features,
    )


def _open_samples(
    config: DictConfig, settings: EvaluationSettings, source: DataSource | None, out: Path
) -> tuple[Pictures | Generation, list[str]]:
    where = str(config.checkpoint or config.samples)
    folder = Path(where).expanduser()
    if config.checkpoint is not None or is_release(folder):
        return _generation(config, settings, folder, out), []
    clips = settings.clips.of_samples() if settings.clips else None
    pictures = open_set(where, key="samples", source=source, clips=clips)
    asked = config.num_samples
    if asked is None and settings.protocol is not None and settings.protocol.num_samples is not None:
        asked = min(settings.protocol.num_samples, len(pictures))
    return take(pictures, asked, key="samples")


def _check_counts(config: DictConfig) -> None:
    for key in ("num_samples", "sample_batch_size", "picture_size", "num_tokens"):
        value = config[key]
        if value is None and key != "sample_batch_size":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key}={value} must be a whole number of at least 1")


def _extractor(settings: EvaluationSettings, device: torch.device, *, clips: bool) -> AnyExtractor | None:
    return clip_extractor(settings, device) if clips else picture_extractor(settings, device)


def make_job(config: DictConfig, settings: EvaluationSettings, out: Path) -> SamplesJob | ReconstructionJob:
    """Load everything a job needs; every mistake of the user shows here, before any work.

    Raises:
        UserError: for whatever is missing or does not fit.
    """
    device = pick_device(config.device)
    source = _load_source(config)
    stem = out.with_suffix("")
    if pick_job(config) == "samples":
        samples, warnings = _open_samples(config, settings, source, out)
        for key in ("num_tokens", "text_features"):
            if config[key] is not None and not isinstance(samples, Generation):
                raise UserError(f"{key} has no effect on stored samples; give it with checkpoint=<generator>")
        extractor = _extractor(settings, device, clips=samples.frames is not None)
        reference = open_reference(
            str(config.reference),
            source=source,
            seed=settings.seed,
            clips=settings.clips,
            expected=None if extractor is None else conventions(extractor),
        )
        if reference.pictures is not None and config.num_reference is not None and reference.statistics is None:
            pictures, more = take(reference.pictures, config.num_reference, key="reference")
            reference = replace(reference, pictures=pictures)
            warnings = [*warnings, *(text.replace("samples were scored", "real pictures were used") for text in more)]
        picture = stem.with_name(f"{stem.name}_nearest.png")
        captions = _captions(config, settings, samples, device)
        return SamplesJob(samples, reference, settings, extractor, picture, captions, warnings)
    return _reconstruction_job(config, settings, source, device, stem)


def _captions(
    config: DictConfig, settings: EvaluationSettings, samples: Pictures | Generation, device: torch.device
) -> tuple[list[str], ClipScorer] | None:
    if "clip_score" not in settings.metrics or config.captions is None or samples.frames is not None:
        return None
    assert settings.clip_model is not None
    count = len(samples.labels) if isinstance(samples, Generation) else len(samples)
    texts = read_captions(Path(str(config.captions)).expanduser(), count)
    return texts, load_clip(Path(settings.clip_model).expanduser(), device=device)


def _reconstruction_job(
    config: DictConfig, settings: EvaluationSettings, source: DataSource | None, device: torch.device, stem: Path
) -> ReconstructionJob:
    if config.num_tokens is not None or config.text_features is not None:
        raise UserError(
            "num_tokens and text_features are for generators; python -m benchmarks.flextok_lengths scores a tokenizer "
            "at every length"
        )
    where = "data.val" if config.reference in (None, "data") else str(config.reference)
    stored = config.checkpoint is None
    clips = settings.clips
    found = open_set(where, key="reference", source=source, clips=clips)
    originals, warnings = take(found, config.num_samples, key="reference")
    made: Any
    if stored:
        samples = open_set(str(config.samples), key="samples", source=source, clips=clips)
        made, _ = take(samples, config.num_samples, key="samples")
    else:
        made = load_tokenizer(Path(str(config.checkpoint)).expanduser())
    extractor, lpips = reconstruction_networks(settings, device, clips=originals.frames is not None)
    picture = stem.with_name(f"{stem.name}_reconstructions.png")
    return ReconstructionJob(made, originals, settings, extractor, lpips, device, picture, warnings)


def evaluate(config: DictConfig) -> dict:
    """Run the evaluation a configuration describes and write its report, in a multirun also the table of all jobs.

    Args:
        config: composed ``configs/evaluate.yaml``.

    Returns:
        The report, complete on process 0; empty for job=statistics, which writes an .npz file instead.

    Raises:
        UserError: for anything the user can mend, before the scoring starts where it can be known then.
    """
    start = datetime.now(UTC)
    name = pick_job(config)
    _check_counts(config)
    settings = load_settings(config)
    if name == "statistics":
        _write_statistics(config, settings)
        return {}
    out = _output(config, str(config.checkpoint or config.samples))
    job = make_job(config, settings, out)
    with joined(pick_device(config.device), stay=_multirun()) as processes:
        result = job.run(processes)
    report = _report(config, name, job, result, start, processes.world_size)
    if rank() == 0:
        write_report(report, out)
        print_report(report, out)
        if isinstance(job, SamplesJob) and isinstance(job.samples, Generation) and not config.keep_samples:
            shutil.rmtree(job.samples.samples)
        if _multirun():
            table = write_table(_sweep_folder(config))
            print(f"table of the runs so far: {table}")
    return report


def _write_statistics(config: DictConfig, settings: EvaluationSettings) -> None:
    device, source = pick_device(config.device), _load_source(config)
    out = Path(str(config.out if config.out is not None else f"{config.samples}.statistics.npz")).expanduser()
    if out.suffix != ".npz":
        raise UserError(f"out={out} must end in .npz; job=statistics writes a file that reference= reads")
    writable_report(out)
    found = open_set(str(config.samples), key="samples", source=source, clips=settings.clips)
    pictures, _ = take(found, config.num_samples, key="samples")
    extractor = _extractor(settings, device, clips=pictures.frames is not None)
    if extractor is None:
        raise UserError("job=statistics needs an extractor; choose one with evaluation=fid or evaluation.features=...")
    with joined(device, stay=_multirun()) as processes:
        size = batch_size(settings, pictures)
        measure_statistics(pictures, extractor=extractor, batch_size=size, processes=processes, out=out)
    if rank() == 0:
        print(f"statistics of {len(pictures)} items: {out}")


def _report(
    config: DictConfig, name: str, job: SamplesJob | ReconstructionJob, result: dict, start: datetime, world_size: int
) -> dict:
    settings, extractor = job.settings, job.extractor
    source = result.pop("source")
    why_not = _why_not_comparable(job, result)
    checkpoint = None
    if config.checkpoint is not None:
        folder = Path(str(config.checkpoint)).expanduser()
        checkpoint = {"path": str(folder), "sha256": file_sha256(folder / WEIGHTS)}
    estimator = settings.estimator()
    if isinstance(extractor, ClipExtractor):
        estimator |= extractor.variant.estimator()
    return {
        "job": name,
        "protocol": settings.protocol.describe() if settings.protocol else None,
        **result,
        "comparable_with_published": not why_not,
        "why_not": why_not,
        "checkpoint": checkpoint,
        "extractor": extractor.describe() if extractor else None,
        "pixels": {
            "source": source,
            "quantise": settings.quantise if name == "reconstruction" else "round",
            "resize_mode": extractor.resize_mode if isinstance(extractor, Extractor) else None,
        },
        "estimator": estimator,
        "provenance": provenance(_container(config), seed=settings.seed, world_size=world_size, start=start),
        "skipped": job.skipped,
        "warnings": list(dict.fromkeys(job.warnings)),
    }


def _why_not_comparable(job: SamplesJob | ReconstructionJob, result: dict) -> list[str]:
    """What keeps the scores from being set beside published ones; empty if nothing does."""
    extractor, protocol = job.extractor, job.settings.protocol
    if extractor is None:
        return ["no score of the literature was computed"]
    reasons = [] if published(extractor) else [f"the extractor is {extractor.name}"]
    if protocol is None:
        return [*reasons, "no protocol was chosen (evaluation=imagenet256_adm_50k, ...; see docs/evaluation.md)"]
    height, width = result["dataset"]["resolution"]
    sampling = result["sampling"] or {}
    return reasons + protocol.deviations(
        num_samples=result["n_samples"],
        size=(height, width),
        labels=sampling.get("labels"),
        num_reference=result["n_reference"],
        reference_sha256=result["dataset"].get("reference_sha256"),
    )
