"""Videos named by list files: UCF-101 with its official splits, Kinetics, and lists of paths and labels."""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen.data.source import DataSource, existing_folder
from vgen.data.video_clips import ClipOptions, video_source
from vgen.data.video_folder import VIDEOS
from vgen.data.video_index import VideoFiles
from vgen.errors import UserError

Rows = list[tuple[str, str]]
"""Path below the folder, and class name, of each video."""


def ucf101(*, path: str, lists: str | None, split: int, train_on: str, **options: Any) -> DataSource:
    """UCF-101 (Soomro et al., arXiv 1212.0402): 13,320 clips of 101 classes, in the official splits.

    Split 1 has 9,537 training and 3,783 test clips. Clips of one group are cut from one source video, so only the
    official splits keep them apart; validation is always the official test list.

    Args:
        path: folder that holds ``<Class>/v_<Class>_g<group>_c<clip>.avi``, or ``UCF-101/<Class>/...``.
        lists: folder of trainlist0N.txt and testlist0N.txt; None for ``ucfTrainTestlist`` in or beside ``path``.
        split: 1, 2 or 3.
        train_on: ``train``, or ``all`` (train and test lists, as StyleGAN-V and DIGAN do).
        options: see :class:`vgen.data.video_clips.ClipOptions`.

    Raises:
        UserError: if folder or lists are missing, or nothing is readable.
    """
    root = existing_folder(path)
    if split not in (1, 2, 3):
        raise UserError(f"data.split={split} must be 1, 2 or 3, one of UCF-101's official splits")
    if train_on not in ("train", "all"):
        raise UserError(f"data.train_on={train_on} must be train or all (train and test lists together)")
    places = [root / "ucfTrainTestlist", root.parent / "ucfTrainTestlist"] if lists is None else [Path(lists)]
    folder = next((place.expanduser() for place in places if place.expanduser().is_dir()), None)
    if folder is None:
        raise UserError(f"UCF-101's lists are not in {places[0]}; unpack ucfTrainTestlist there or set data.lists")
    videos = root / "UCF-101" if (root / "UCF-101").is_dir() else root
    train = _ucf_list(folder / f"trainlist0{split}.txt")
    val = _ucf_list(folder / f"testlist0{split}.txt")
    if train_on == "all":
        train = [*train, *val]
    return _listed("ucf101", videos, train, val, None, ClipOptions(**options))


def _ucf_list(path: Path) -> Rows:
    """Lines ``<Class>/<file>.avi`` with or without a number behind; the number is not needed."""
    files = [line.split()[0] for line in _lines(path)]
    return [(file, file.split("/")[0]) for file in files]


def video_list(
    *, path: str, train_list: str, val_list: str, class_names: list[str] | None, **options: Any
) -> DataSource:
    """Videos named by two CSV files with a header.

    Either columns ``path`` (below ``path``) and ``action`` or ``label``, as LARP's lists have them, or Kinetics' own:
    ``label``, ``youtube_id``, ``time_start``, ``time_end`` and ``split``, for files
    ``[<split>/][<label>/]<youtube_id>_<start>_<end>.mp4``, numbers with six digits. Lists of Kinetics name videos
    that cannot be had any more; those are counted and named as missing.

    Args:
        path: folder of the videos.
        train_list: CSV of the training videos, absolute or below ``path``.
        val_list: CSV of the validation videos.
        class_names: in the order of the class numbers; None for the sorted names in the lists.
        options: see :class:`vgen.data.video_clips.ClipOptions`.

    Raises:
        UserError: if a list is missing or has other columns, names an unknown class, or nothing is readable.
    """
    root = existing_folder(path)
    train, val = (_csv_list(root, root / Path(name).expanduser()) for name in (train_list, val_list))
    return _listed(root.resolve().name, root, train, val, class_names, ClipOptions(**options))


def _csv_list(root: Path, path: Path) -> Rows:
    rows = list(csv.DictReader(_lines(path)))
    columns = set(rows[0]) if rows else set()
    if {"path"} < columns and columns & {"action", "label"}:
        key = "action" if "action" in columns else "label"
        return [(row["path"], row[key]) for row in rows]
    if {"label", "youtube_id", "time_start", "time_end"} <= columns:
        return [(_kinetics_file(root, row), row["label"]) for row in rows]
    raise UserError(
        f"{path} has the columns {', '.join(sorted(columns)) or 'of an empty file'}; needed are path with action "
        "or label, or label, youtube_id, time_start and time_end"
    )


def _kinetics_file(root: Path, row: dict[str, str]) -> str:
    """The file of a row, below ``root``; the usual name if none of the possible ones exists."""
    stem = f"{row['youtube_id']}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
    split, label = row.get("split") or "", row["label"]
    folders = [Path(split, label), Path(label), Path(split), Path()]
    names = [str(folder / f"{stem}{end}") for folder in folders for end in (".mp4", ".mkv", ".webm", ".avi")]
    return next((name for name in names if (root / name).is_file()), names[0])


def _lines(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list {path} cannot be read ({error}); check its place") from error
    if not lines:
        raise UserError(f"the list {path} is empty; copy it again")
    return lines


def _listed(
    name: str, root: Path, train: Rows, val: Rows, class_names: list[str] | None, options: ClipOptions
) -> DataSource:
    """A source of two lists; classes are numbered in the order of their names, unless they are numbers themselves."""
    found = {label for _, label in (*train, *val)}
    if all(label.isdigit() for label in found):
        names = class_names or [str(number) for number in range(1 + max(map(int, found)))]
        number_of = {label: int(label) for label in found}
    else:
        names = class_names or sorted(found)
        unknown = sorted(found - set(names))
        if unknown:
            raise UserError(f"the lists name the class {unknown[0]}, which is not in data.class_names; add it there")
        number_of = {label: names.index(label) for label in found}

    def split(rows: Rows) -> tuple[VideoFiles, Tensor]:
        return VideoFiles(root, tuple(file for file, _ in rows)), torch.tensor([number_of[label] for _, label in rows])

    for rows in (train, val):
        odd = next((file for file, _ in rows if not VIDEOS.matches(Path(file).name)), None)
        if odd is not None:
            raise UserError(f"the list names {odd}, which is no video ({' '.join(sorted(VIDEOS.extensions))})")
    return video_source(
        name=name,
        where=root,
        train=split(train),
        val=split(val),
        num_classes=len(names),
        class_names=names,
        val_fraction=0.0,
        options=options,
    )
