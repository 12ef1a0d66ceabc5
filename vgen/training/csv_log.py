"""A CSV log that a resumed run continues instead of replacing."""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only


class CsvLogger(Logger):
    """Writes ``metrics.csv``: one row per log call, a column per figure, readable at any moment.

    Lightning's own CSV logger deletes the file of an earlier run in the same folder.

    Args:
        folder: where to write.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] = ["step"]
        self._rows: list[dict[str, Any]] = []
        self._started = False

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """The folder decides which run this is, so there is one version."""
        return "0"

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The configuration lies beside the log as ``config.yaml``; nothing to write."""

    @rank_zero_only
    def start(self, step: int) -> None:
        """Begin at an optimizer step: keep the rows of an earlier part of the run up to it."""
        self._started = True
        if self.path.is_file():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                kept = [row for row in reader if row["step"].isdigit() and int(row["step"]) <= step]
                self._columns = list(reader.fieldnames or self._columns)
            self._rows = kept if step else []
        self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row."""
        if not self._started:
            self.start(0)
        row = {"step": step, **metrics}
        self._rows.append(row)
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._rewrite()
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _rewrite(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".csv.partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows)
        partial.replace(self.path)
