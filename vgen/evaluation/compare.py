"""Set two reports beside each other, or refuse because they do not measure the same thing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vgen.errors import UserError
from vgen.evaluation.table import read_report

# What two scores must share to be comparable, where it stands in a report.
CONVENTIONS = {
    "kind of job": ("job",),
    "extractor": ("extractor", "sha256"),
    "layer": ("extractor", "layer"),
    "resize": ("pixels", "resize_mode"),
    "rounding to 8 bits": ("pixels", "quantise"),
    "dialect": ("estimator", "dialect"),
    "divisor of the covariance": ("estimator", "covariance_divisor"),
    "variant of FVD": ("estimator", "fvd_variant"),
    "convention of SSIM": ("estimator", "ssim"),
    "protocol": ("protocol", "name"),
    "number of samples": ("n_samples",),
    "number of real pictures": ("n_reference",),
    "resolution": ("dataset", "resolution"),
    "frames of a clip": ("dataset", "clip_frames"),
    "name of the reference": ("dataset", "reference"),
}


def _at(report: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = report
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Conventions in which two reports differ, in words."""
    return [
        f"{words}: {_at(a, path)} and {_at(b, path)}"
        for words, path in CONVENTIONS.items()
        if _at(a, path) != _at(b, path)
    ]


def compare(first: Path, second: Path) -> dict[str, tuple[float, float]]:
    """Metrics that both reports hold.

    Args:
        first: report of evaluate.py.
        second: another one.

    Raises:
        UserError: if the reports were made with different conventions, naming them, or share no metric.
    """
    a, b = read_report(first), read_report(second)
    found = differences(a, b)
    if found:
        raise UserError(f"{first} and {second} do not measure the same thing ({'; '.join(found)})")
    shared = {name: (value, b["metrics"][name]) for name, value in a["metrics"].items() if name in b["metrics"]}
    if not shared:
        raise UserError(f"{first} and {second} share no metric")
    return shared
