"""The JSON report of an evaluation and its one-screen table."""

import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from vgen import runtime
from vgen.errors import UserError

SCHEMA = "vgen.eval/1"


def label_histogram(labels: Tensor | None) -> dict | None:
    """Least and most frequent count and number of classes present, None without labels."""
    if labels is None or not len(labels):
        return None
    counts = labels.unique(return_counts=True)[1]
    return {"min": int(counts.min()), "max": int(counts.max()), "num_classes": len(counts)}


def provenance(config: Mapping, *, seed: int, world_size: int, start: datetime) -> dict:
    """Who made the numbers: commit, configuration, versions, processes, times."""
    end = datetime.now(UTC)
    return {
        "git_commit": runtime.git_commit(),
        "config": dict(config),
        "versions": runtime.versions(),
        "seed": seed,
        "world_size": world_size,
        "start": start.isoformat(timespec="seconds"),
        "end": end.isoformat(timespec="seconds"),
        "seconds": round((end - start).total_seconds(), 1),
    }


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not know, by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def writable_report(out: str | Path) -> Path:
    """Check, before any work, that a report can be written.

    Raises:
        UserError: if the folder cannot be written or the path is a folder.
    """
    path = Path(out).expanduser()
    if path.is_dir():
        raise UserError(f"out={path} is a folder; give a file, for example out={path / 'report.json'}")
    runtime.writable_folder(path.parent, "out")
    return path


def write_report(report: Mapping, path: Path) -> None:
    """Write the report in one step: a reader sees the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(_finite({"schema": SCHEMA, **report}), indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)


def _shown(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"


def _print_conventions(report: Mapping, console: Any) -> None:
    """What a reader must know to compare the numbers: network, dialect, protocol, and what speaks against comparing."""
    extractor = report.get("extractor")
    if not extractor:
        return
    console.print(f"extractor: {extractor['name']} ({extractor['file']}, sha256 {extractor['sha256'][:8]})")
    estimator = report["estimator"]
    if "fvd_variant" in estimator:
        console.print(f"variant: {estimator['fvd_variant']} ({estimator['fvd_source']})")
    else:
        console.print(f"dialect: {estimator['dialect']}; resize: {report['pixels']['resize_mode']}")
    if report.get("protocol"):
        console.print(f"protocol: {report['protocol']['name']} ({report['protocol']['source']})")
    for reason in report["why_not"]:
        console.print(f"not comparable with published scores: {reason}")


def print_report(report: Mapping, path: Path) -> None:
    """Show the report as one table on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    what = "clips" if report["dataset"].get("clip_frames") else "pictures"
    count = f"{report['n_samples']} {what}"
    if report.get("n_reference"):
        count += f" against {report['n_reference']}"
    table = Table(title=f"{report['job']}: {count}", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in report["metrics"].items():
        if not name.endswith("_std"):
            spread = report["metrics"].get(f"{name}_std")
            table.add_row(name, _shown(value) + (f" +- {_shown(spread)}" if spread is not None else ""))
    console.print(table)
    _print_conventions(report, console)
    for name, reason in report["skipped"].items():
        console.print(f"not computed: {name} ({reason})")
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow")
    for name, picture in report["pictures_saved"].items():
        console.print(f"{name}: {picture}")
    console.print(f"report: {path}")
