"""Parquet files in the layout of the Hugging Face hub: an image column {bytes, path} and an integer label column."""

import bisect
import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen.data.encoded import encoded_source
from vgen.data.source import DataSource, existing_folder
from vgen.errors import UserError

VAL_SPLITS = ("validation", "valid", "val", "test")
CACHED_GROUPS = 16
"""Row groups each process keeps; the hub writes about 100 images per group."""


def parquet(
    *,
    path: str,
    image_size: int | None,
    crop: str | None,
    flip: bool,
    val_fraction: float,
    val_split: str | None,
    image_column: str,
    label_column: str,
    num_classes: int | None,
    class_names: Iterable[str] | None,
    in_memory: bool | None,
    seed: int,
) -> DataSource:
    """Read a folder of parquet files.

    Splits are told by the beginning of the file names (``train-``, ``test-``, ``validation-``); files without such a
    name are all training data.

    Args:
        path: folder with ``*.parquet``, directly or in ``data/``.
        image_size: side in pixels, None for the native size (all images must agree).
        crop: adm_center, adm_random, center, random, none, or None to decide by ``image_size``.
        flip: mirror training images with probability 1/2.
        val_fraction: share of the training images set aside where there is no other split.
        val_split: which split validates (test, validation, ...); None takes the first of validation, val, test.
        image_column: name of the image column: struct {bytes, path} or plain bytes.
        label_column: name of the integer label column.
        num_classes: None takes it from the files' metadata or the largest label.
        class_names: None takes them from the files' metadata.
        in_memory: decode once into memory, or read row groups when drawn; None decides by size.
        seed: of the split and of the augmentation.

    Raises:
        UserError: for unreadable files, missing columns and bad labels.
    """
    root = existing_folder(path)
    splits = _splits(root)
    train_files = splits.pop("train", None) or splits.pop("", None)
    if not train_files:
        raise UserError(f"{root} has no train-*.parquet file, only {', '.join(splits)}; check data.path")
    if val_split is not None and val_split not in splits:
        raise UserError(f"data.val_split={val_split} is not in {root}; choose one of {', '.join(splits) or 'null'}")
    name = val_split or next((split for split in VAL_SPLITS if split in splits), None)
    train, stored_names = _open(train_files, root, image_column, label_column)
    val = None if name is None else _open(splits[name], root, image_column, label_column)[0]
    return encoded_source(
        name=root.resolve().name,
        where=root,
        train=train,
        val=val,
        num_classes=num_classes,
        class_names=class_names or stored_names,
        image_size=image_size,
        crop=crop,
        flip=flip,
        val_fraction=val_fraction,
        in_memory=in_memory,
        seed=seed,
    )


def _splits(root: Path) -> dict[str, list[Path]]:
    """Parquet files by split; those whose name tells none are under the empty name."""
    files = sorted(root.glob("*.parquet")) or sorted((root / "data").glob("*.parquet"))
    if not files:
        raise UserError(f"{root} holds no *.parquet file; check data.path")
    splits: dict[str, list[Path]] = {}
    for file in files:
        match = re.match(r"(train|test|validation|valid|val)(?=[-_.])", file.name)
        splits.setdefault(match[1] if match else "", []).append(file)
    return splits


def _open(
    files: list[Path], root: Path, image_column: str, label_column: str
) -> tuple[tuple["ParquetReader", Tensor], list[str] | None]:
    """Check all files of a split, read the labels and, if stored, the class names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    groups: list[tuple[Path, int, int]] = []
    labels: list[Tensor] = []
    names: list[str] | None = None
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                _check_columns(path, file.schema_arrow, image_column, label_column)
                for group in range(file.num_row_groups):
                    groups.append((path, group, file.metadata.row_group(group).num_rows))
                column = file.read(columns=[label_column])[label_column]
                names = names or _stored_names(file.schema_arrow, label_column)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a readable parquet file ({error}); download it again") from error
        if column.null_count:
            raise UserError(f"{path}: column {label_column} has {column.null_count} empty labels; fill or remove them")
        labels.append(torch.tensor(column.to_pylist(), dtype=torch.int64))
    joined = torch.cat(labels)
    if not len(joined):
        raise UserError(f"{files[0]} holds no image; check data.path")
    return (ParquetReader(root, groups, image_column), joined), names


def _check_columns(path: Path, schema: Any, image_column: str, label_column: str) -> None:
    import pyarrow as pa

    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in schema.names:
            raise UserError(f"{path} has no column {column}, only {', '.join(schema.names)}; set data.{key}")
    kind = schema.field(image_column).type
    if pa.types.is_struct(kind):
        fine = any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    else:
        fine = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    if not fine:
        raise UserError(f"{path}: column {image_column} is {kind}, not encoded images; set data.image_column")
    if not pa.types.is_integer(schema.field(label_column).type):
        raise UserError(f"{path}: column {label_column} does not hold integers; set data.label_column")


def _stored_names(schema: Any, label_column: str) -> list[str] | None:
    """Class names that the datasets library stores in the schema."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None:
        return None
    feature = json.loads(stored).get("info", {}).get("features", {}).get(label_column, {})
    return feature.get("names") if isinstance(feature, dict) else None


class ParquetReader:
    """Encoded images of parquet files, read by row groups; fulfils :class:`vgen.data.encoded.Reader`.

    A few row groups stay in memory, so reading in order touches each once. Random access to a large set reads a whole
    group for most images; to train on one for long, cache its codes (:mod:`vgen.data.extract`).
    """

    def __init__(self, root: Path, groups: list[tuple[Path, int, int]], column: str):
        self._root, self._groups, self._column = root, groups, column
        self._ends: list[int] = torch.tensor([rows for _, _, rows in groups]).cumsum(0).tolist()
        self._first_rows: list[int] = []
        for i, (_, number, _) in enumerate(groups):
            self._first_rows.append(self._first_rows[i - 1] + groups[i - 1][2] if number else 0)
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process starts with an empty cache and its own lock.
        return ParquetReader, (self._root, self._groups, self._column)

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, index: int) -> tuple[int, int]:
        """Row group and row inside it."""
        group = bisect.bisect_right(self._ends, index)
        return group, index - (self._ends[group - 1] if group else 0)

    def _load(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with self._lock:
            if group not in self._cache:
                path, number, _ = self._groups[group]
                try:
                    with pq.ParquetFile(path, memory_map=True) as file:
                        table = file.read_row_group(number, columns=[self._column], use_threads=False)
                except pa.ArrowException as error:
                    raise OSError(f"row group {number}: {error}") from error
                self._cache[group] = table[self._column]
                if len(self._cache) > CACHED_GROUPS:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(group)
            return self._cache[group]

    def read(self, index: int) -> bytes | None:
        """The bytes of one image, from the file itself or from the path it names."""
        group, row = self._locate(index)
        value = self._load(group)[row].as_py()
        if not isinstance(value, dict):
            return value
        if value["bytes"] is None and value.get("path"):
            return (self._root / value["path"]).read_bytes()
        return value["bytes"]

    def name(self, index: int) -> str:
        """File and row of one image."""
        group, row = self._locate(index)
        return f"{self._groups[group][0]} row {self._first_rows[group] + row}"

    def fingerprint(self) -> str:
        """Hash of file names, sizes and row counts."""
        facts = [(path.name, path.stat().st_size, group, rows) for path, group, rows in self._groups]
        return hashlib.sha256(repr(facts).encode()).hexdigest()
