"""Video files in folders, one folder per class or a single flat folder."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from vgen.data.folder import FileKind, Split, scan_splits
from vgen.data.source import DataSource, existing_folder
from vgen.data.video_clips import ClipOptions, video_source
from vgen.data.video_index import VideoFiles

VIDEOS = FileKind("video", frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif", ".mpg", ".mpeg")))


def video_folder(
    *, path: str, val_fraction: float, class_names: Iterable[str] | None = None, **options: Any
) -> DataSource:
    """Read a folder of videos, in the same layouts as :func:`vgen.data.folder.folder`.

    Args:
        path: the folder.
        val_fraction: share of each class set aside where there is no validation folder.
        class_names: to show instead of the folders' names, in their order.
        options: see :class:`vgen.data.video_clips.ClipOptions`.

    Raises:
        UserError: if a class holds no video, the two splits have different classes, or nothing is readable.
    """
    root = existing_folder(path)
    train, val, classes = scan_splits(root, VIDEOS)
    return video_source(
        name=root.resolve().name,
        where=root,
        train=_files(train),
        val=None if val is None else _files(val),
        num_classes=max(1, len(classes)),
        class_names=class_names or classes or ["video"],
        val_fraction=val_fraction,
        options=ClipOptions(**options),
    )


def _files(split: Split) -> tuple[VideoFiles, Tensor]:
    reader, labels = split
    return VideoFiles(reader.root, reader.files), labels
