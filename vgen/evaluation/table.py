"""One table out of many reports: CSV, and pictures of the score against guidance scale and speed."""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from vgen.errors import UserError
from vgen.evaluation.report import SCHEMA

LONGEST_NAME = 120
PREFERRED = ("fid", "fd", "fvd", "video_fd")  # what the pictures show, by the beginning of the metric's name
FACTS = ("run", "order", "scale", "forward_passes", "images_per_s", "n_samples", "n_reference", "extractor", "protocol")


def job_folder(sweep: Path) -> Path:
    """Folder of the current job of a multirun: how it samples in plain words, and a hash of all its overrides."""
    job = HydraConfig.get()
    words = [text.removeprefix("sampling.") for text in job.overrides.task if text.startswith(("sampling", "schedule"))]
    readable = ",".join(words).replace("/", "_")[:LONGEST_NAME]
    digest = hashlib.sha256("\n".join(sorted(job.overrides.task)).encode()).hexdigest()[:8]
    return sweep / (f"{readable}-{digest}" if readable else digest)


def read_report(path: Path) -> dict[str, Any]:
    """Read a report of evaluate.py.

    Raises:
        UserError: if it is none.
    """
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable report ({error})") from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a report of evaluate.py ({SCHEMA})")
    return report


def row(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A row of the table: facts about the samples, then every metric."""
    sampling = report.get("sampling") or {}
    facts = {
        "run": name,
        "order": sampling.get("schedule"),
        "scale": (sampling.get("guidance") or {}).get("scale"),
        "forward_passes": sampling.get("forward_passes"),
        "images_per_s": sampling.get("images_per_s"),
        "n_samples": report["n_samples"],
        "n_reference": report["n_reference"],
        "extractor": (report.get("extractor") or {}).get("name"),
        "protocol": (report.get("protocol") or {}).get("name"),
    }
    return facts | dict(report["metrics"])


def write_table(folder: Path, reports: Iterable[Path] | None = None) -> Path:
    """Write ``table.csv`` and the pictures that its columns allow.

    It is made anew from the reports that are there, so that a killed sweep keeps the table of its finished runs.

    Args:
        folder: where to write.
        reports: report files; those of the sub-folders when None.

    Returns:
        The CSV file.

    Raises:
        UserError: if there is no report, or one of them is damaged.
    """
    paths = sorted(reports if reports is not None else folder.glob("*/report.json"))
    if not paths:
        raise UserError(f"{folder} holds no report (<run>/report.json)")
    rows = [row(read_report(path), path.parent.name if path.stem == "report" else path.stem) for path in paths]
    columns = list(dict.fromkeys([*FACTS, *(key for line in rows for key in line)]))
    rows.sort(key=lambda line: (str(line["order"]), line["scale"] or 0.0, line["run"]))
    target = folder / "table.csv"
    partial = target.with_name(f".table.{os.getpid()}")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, target)
    score = shown_score(columns)
    if score is not None:
        for axis, words in (("scale", "guidance scale"), ("images_per_s", "images per second")):
            draw(rows, score, axis, words, folder / f"{score}_vs_{axis}.png")
    return target


def shown_score(columns: Iterable[str]) -> str | None:
    """The metric that the pictures show, None if there is no distance."""
    names = [name for name in columns if not name.endswith("_std")]
    for wanted in PREFERRED:
        for name in names:
            if name == wanted or name.startswith(f"{wanted}_"):
                return name
    return None


def draw(rows: Iterable[Mapping[str, Any]], score: str, axis: str, words: str, path: Path) -> None:
    """Draw a score against a column, one line per decode order; nothing without two points."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in rows:
        if line.get(axis) is not None and line.get(score) is not None:
            points.setdefault(str(line["order"]), []).append((float(line[axis]), float(line[score])))
    if sum(map(len, points.values())) < 2:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for order, pairs in points.items():
        pairs.sort()
        axes.plot(*zip(*pairs, strict=True), marker="o", label=order)
    axes.set(xlabel=words, ylabel=score)
    axes.grid(alpha=0.3)
    axes.legend()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    canvas.print_figure(partial, format="png")
    os.replace(partial, path)
