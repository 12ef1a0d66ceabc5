"""What ``samples=`` and ``reference=`` may name: files, splits of the data group, stored statistics."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgen.checkpoints.release import file_sha256
from vgen.data.source import DataSource
from vgen.errors import UserError
from vgen.evaluation.array_reader import ArrayPictures, array_names
from vgen.evaluation.pictures import Pictures, Subset
from vgen.evaluation.readers import DatasetPictures, open_pictures
from vgen.evaluation.statistics import SetStatistics, has_statistics, load_statistics
from vgen.evaluation.video_files import ClipChoice
from vgen.random import keyed_permutation

SPLITS = {"data": "train", "data.train": "train", "data.val": "val"}


@dataclass(frozen=True)
class Reference:
    """Real pictures or clips, or what is known of them.

    Attributes:
        name: for messages and reports.
        pictures: all that distances of feature sets compare with; None where only statistics are at hand.
        training: the part a classifier is fitted on and copies are looked for in.
        held_out: other real pictures, the scale of both checks.
        split: how training and held-out parts were told apart.
        statistics: stored fits, used instead of those of ``pictures``.
        sha256: of the file the statistics come from.
    """

    name: str
    pictures: Pictures | None
    training: Pictures | None = None
    held_out: Pictures | None = None
    split: str | None = None
    statistics: SetStatistics | None = None
    sha256: str | None = None

    @property
    def count(self) -> int | None:
        """Real items behind the distances, None if the file of statistics does not say."""
        if self.statistics is not None:
            return self.statistics.pool.count or None
        return None if self.pictures is None else len(self.pictures)

    def check_width(self, dim: int, extractor: str) -> None:
        """Refuse stored statistics of another number of features than the extractor's, before any work.

        Raises:
            UserError: naming both numbers.
        """
        if self.statistics is not None and self.statistics.pool.dim != dim:
            raise UserError(
                f"reference={self.name} was made with {self.statistics.pool.dim} features, {extractor} has {dim}"
            )


def open_set(where: str, *, key: str, source: DataSource | None, clips: ClipChoice | None = None) -> Pictures:
    """Open ``data``, ``data.train``, ``data.val``, or what :func:`vgen.evaluation.readers.open_pictures` opens.

    Raises:
        UserError: if it does not exist, or names the data group when none was chosen.
    """
    if where not in SPLITS:
        return open_pictures(where, key=key, class_names=source.class_names if source else (), clips=clips)
    if source is None:
        raise UserError(
            f"{key}={where} names the data group but none is chosen; add data=<name>, for example data=digits"
        )
    split = SPLITS[where]
    return DatasetPictures(getattr(source, split), f"{source.name} {split}")


def open_reference(
    where: str,
    *,
    source: DataSource | None,
    seed: int,
    key: str = "reference",
    clips: ClipChoice | None = None,
    expected: Mapping[str, Any] | None = None,
) -> Reference:
    """Open the real side of a comparison.

    The data group brings its own split into training and held-out pictures; of a folder or file every fifth picture,
    drawn by ``seed``, is held out. An .npz file with ``mu`` and ``sigma`` (a reference batch of the ADM suite, or
    statistics of ours or of another tool) gives the statistics, and its pictures, if it holds any, all else.

    Args:
        where: ``data``, ``data.val``, a folder or a file.
        source: data set that ``data`` means.
        seed: of the held-out part.
        key: configuration key that ``where`` came from, for messages.
        clips: which frames of video files make a clip.
        expected: conventions that stored statistics must have been made with, as far as they say.

    Raises:
        UserError: if it does not exist, is damaged, or its statistics were made with other conventions.
    """
    path = Path(where).expanduser()
    if where not in SPLITS and path.is_file() and has_statistics(path):
        statistics = load_statistics(path, expected=expected)
        batch = ArrayPictures(path) if "arr_0" in array_names(path) else None
        split = _held_out(batch, seed) if batch is not None else {}
        return Reference(str(path), batch, **split, statistics=statistics, sha256=file_sha256(path))
    pictures = open_set(where, key=key, source=source, clips=clips)
    if SPLITS.get(where) == "train":
        held_out = open_set("data.val", key=key, source=source)
        return Reference(pictures.name, pictures, pictures, held_out, "data group")
    return Reference(pictures.name, pictures, **_held_out(pictures, seed))


def _held_out(pictures: Pictures, seed: int) -> dict[str, Any]:
    order = keyed_permutation(len(pictures), seed).tolist()
    cut = len(order) - len(order) // 5
    return {
        "training": Subset(pictures, sorted(order[:cut]), f"{pictures.name} (training part)"),
        "held_out": Subset(pictures, sorted(order[cut:]), f"{pictures.name} (held-out part)"),
        "split": f"one in five held out, seed {seed}",
    }


def take(pictures: Pictures, count: int | None, *, key: str) -> tuple[Pictures, list[str]]:
    """The first ``count`` items of a set (all when None), and warnings for the report.

    Raises:
        UserError: if the set holds fewer.
    """
    if count is None or count == len(pictures):
        return pictures, []
    if count > len(pictures):
        raise UserError(f"num_samples={count} were asked for but {key}={pictures.name} holds {len(pictures)}")
    return Subset(pictures, range(count), pictures.name), [
        f"only the first {count} of {len(pictures)} samples were scored"
    ]
