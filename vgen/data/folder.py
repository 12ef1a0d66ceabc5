"""Image files in folders, one folder per class (ImageNet layout) or a single flat folder."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vgen.data.encoded import FileReader, encoded_source
from vgen.data.source import DataSource, existing_folder
from vgen.errors import UserError

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
)
VAL_FOLDERS = ("val", "validation", "valid", "test")
Split = tuple[FileReader, Tensor]


@dataclass(frozen=True)
class FileKind:
    """What a folder is searched for.

    Attributes:
        noun: in messages.
        extensions: of the files, lower case with the dot.
    """

    noun: str
    extensions: frozenset[str]

    def matches(self, name: str) -> bool:
        """Whether a file name is of this kind."""
        return os.path.splitext(name)[1].lower() in self.extensions and not name.startswith(".")


IMAGES = FileKind("image", EXTENSIONS)


def folder(
    *,
    path: str,
    image_size: int | None,
    crop: str | None,
    flip: bool,
    val_fraction: float,
    class_names: Iterable[str] | None = None,
    in_memory: bool | None,
    seed: int,
) -> DataSource:
    """Read a folder of images.

    Layouts, tried in this order: ``path/train/<class>/...`` with an optional ``path/val/<class>/...`` (or validation,
    valid, test); ``path/<class>/...``; images directly in ``path`` (or ``path/train``), which are then one class.
    Classes are numbered in the order of their folders' names. Without a validation folder ``val_fraction`` of each
    class is set aside, the same images for the same seed.

    Args:
        path: the folder.
        image_size: side in pixels, None for the native size.
        crop: adm_center, adm_random, center, random, none, or None to decide by ``image_size``.
        flip: mirror training images with probability 1/2.
        val_fraction: used where there is no validation folder.
        class_names: to show instead of the folders' names, in their order.
        in_memory: decode once into memory; None decides by size.
        seed: of the split and of the augmentation.

    Raises:
        UserError: if the folder or a class holds no image, or the two splits have different classes.
    """
    root = existing_folder(path)
    train, val, classes = scan_splits(root, IMAGES)
    return encoded_source(
        name=root.resolve().name,
        where=root,
        train=train,
        val=val,
        num_classes=max(1, len(classes)),
        class_names=class_names or classes or ["image"],
        image_size=image_size,
        crop=crop,
        flip=flip,
        val_fraction=val_fraction,
        in_memory=in_memory,
        seed=seed,
    )


def scan_splits(root: Path, kind: FileKind) -> tuple[Split, Split | None, list[str]]:
    """Find training and validation files and the names of the classes, in the layouts of :func:`folder`.

    Raises:
        UserError: if the folder or a class holds no file of the kind, or the two splits have different classes.
    """
    train_root = root / "train" if (root / "train").is_dir() else root
    classes = _class_folders(train_root, kind)
    train = _scan(train_root, classes, kind)
    val = None
    if train_root != root:
        val_root = next((root / name for name in VAL_FOLDERS if (root / name).is_dir()), None)
        val = None if val_root is None else _scan_val(val_root, classes, train_root, kind)
    return train, val, classes


def _class_folders(root: Path, kind: FileKind) -> list[str]:
    """Sorted names of the class folders of ``root``; none if the files lie directly in it."""
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    classes = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    loose = [entry.name for entry in entries if kind.matches(entry.name)]
    if classes and loose:
        raise UserError(
            f"{root} holds both folders ({classes[0]}, ...) and {kind.noun}s ({loose[0]}, ...); put every {kind.noun} "
            "into the folder of its class, or all into one folder"
        )
    return classes


def _files(root: Path, below: str, kind: FileKind) -> list[str]:
    """Sorted paths, relative to ``root``, of the files anywhere under ``root/below``."""
    found = []
    for directory, folders, names in os.walk(root / below, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        place = os.path.relpath(directory, root)
        found += [os.path.normpath(os.path.join(place, name)) for name in sorted(names) if kind.matches(name)]
    return found


def _scan(root: Path, classes: list[str], kind: FileKind, *, allow_empty: bool = False) -> Split:
    """All files of the classes, or of the flat folder, with their labels."""
    groups = [_files(root, name, kind) for name in classes] if classes else [_files(root, "", kind)]
    if not any(groups):
        raise UserError(f"{root} holds no {kind.noun} ({' '.join(sorted(kind.extensions))}); check data.path")
    empty = [name for name, files in zip(classes, groups, strict=False) if not files]
    if empty and not allow_empty:
        raise UserError(
            f"{root / empty[0]} holds no {kind.noun}; add {kind.noun}s or remove the folder ({len(empty)} such)"
        )
    labels = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([len(files) for files in groups]))
    return FileReader(root, tuple(name for files in groups for name in files)), labels


def _scan_val(root: Path, classes: list[str], train_root: Path, kind: FileKind) -> Split:
    found = _class_folders(root, kind)
    if bool(found) != bool(classes):
        raise UserError(f"{root} must have the same layout as {train_root}: {kind.noun}s in one folder per class")
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise UserError(f"{root / unknown[0]} has no counterpart in {train_root}; make the class folders agree")
    return _scan(root, classes, kind, allow_empty=True)
