"""Token ids of a whole data set in memory-mapped files, tied to the tokenizer that made them."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from vgen.data.source import Batch, CodeSource, Draws, check_labels, existing_folder, stratified_split
from vgen.errors import UserError
from vgen.random import keyed_uniform

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
PENDING = -2
"""Label of a row that is not encoded yet."""
BROKEN = -1
"""Label of a row whose image could not be read; such rows are never served."""
DESCRIPTIVE = ("complete", "done", "broken")
"""Manifest entries that grow while encoding; all others identify the cache."""


@dataclass(frozen=True)
class Manifest:
    """What a cache folder holds.

    Attributes:
        format: version of the layout.
        source: name of the data.
        source_hash: fingerprint of the data.
        split: train or val.
        num_images: rows of ``codes.npy``.
        num_classes: labels are 0..num_classes-1.
        class_names: one per class.
        image_size: side in pixels of what was encoded.
        augmentation: none, flip, shift or ten_crop.
        crop_ratios: sizes of the centre crops that ten-crop starts from, relative to ``image_size``.
        num_variants: stored encodings per image.
        grid: token grid.
        codebook_size: ids are 0..codebook_size-1.
        tokenizer_hash: :func:`tokenizer_fingerprint` of the tokenizer.
        complete: whether all rows are encoded.
        done: rows encoded so far (exact once complete).
        broken: names of the images that could not be read.
    """

    format: int
    source: str
    source_hash: str
    split: str
    num_images: int
    num_classes: int
    class_names: tuple[str, ...]
    image_size: int
    augmentation: str
    crop_ratios: tuple[float, ...]
    num_variants: int
    grid: tuple[int, ...]
    codebook_size: int
    tokenizer_hash: str
    complete: bool = False
    done: int = 0
    broken: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of one encoding."""
        return int(torch.tensor(self.grid).prod())

    def differences(self, other: "Manifest") -> list[str]:
        """Names of the identifying entries in which two manifests differ."""
        mine, theirs = asdict(self), asdict(other)
        return [key for key in mine if key not in DESCRIPTIVE and mine[key] != theirs[key]]

    def write(self, folder: Path) -> None:
        """Replace ``folder/manifest.json`` in one step, so that no reader ever sees half of it."""
        temporary = folder / f".manifest-{os.getpid()}"
        with temporary.open("w") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / "manifest.json")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read ``folder/manifest.json``.

        Raises:
            UserError: if it is missing, damaged or of another format.
        """
        path = folder / "manifest.json"
        try:
            stored = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise UserError(f"{folder} holds no cached codes (no manifest.json); check data.path") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete the folder and encode again") from error
        if not isinstance(stored, Mapping) or stored.get("format") != FORMAT:
            raise UserError(f"{path} is not a manifest of format {FORMAT}; delete the folder and encode again")
        names = {entry.name for entry in fields(cls)}
        if set(stored) != names:
            wrong = ", ".join(sorted(set(stored) ^ names))
            raise UserError(f"{path} has missing or unknown entries ({wrong}); delete the folder and encode again")
        entries: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
        }
        return cls(**entries)


@dataclass(frozen=True, kw_only=True)
class CodeDataset:
    """Cached token ids of one split.

    Attributes:
        codes: uint16 or uint32 memory map [images, variants, N].
        rows: int64 [n], the rows that belong to the set.
        labels: int64 [n].
        augment: draw among the stored variants; otherwise the first one.
        seed: of that draw.
        broken: names of images that could not be encoded.
    """

    codes: "np.ndarray"
    rows: Tensor
    labels: Tensor
    augment: bool
    seed: int = 0
    broken: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """First variant of one image: ids int64 [N], label and index int64 scalars."""
        ids = torch.from_numpy(self.codes[int(self.rows[index]), 0].astype("int64"))
        return {"ids": ids, "label": self.labels[index], "index": torch.tensor(index)}

    def __getitems__(self, draws: Draws) -> Batch:
        """A batch: ids int64 [B, N], label int64 [B], index int64 [B]."""
        index, draw = torch.as_tensor(draws, dtype=torch.int64).unbind(1)
        variant = torch.zeros_like(index)
        if self.augment:
            variant = (keyed_uniform(self.seed, draw) * self.codes.shape[1]).long()
        ids = self.codes[self.rows[index].numpy(), variant.numpy()]
        return {"ids": torch.from_numpy(ids.astype("int64")), "label": self.labels[index], "index": index}

    def subset(self, indices: Tensor) -> Self:
        """The images at ``indices`` (int64 [m])."""
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])

    def without_augmentation(self) -> Self:
        """The same images, always in their first variant."""
        return replace(self, augment=False)


def codes(*, path: str, val_fraction: float, seed: int, tokenizer_hash: str | None = None) -> CodeSource:
    """Read cached codes.

    Args:
        path: folder with ``train`` and, optionally, ``val`` as written by :func:`vgen.data.extract.cache_codes`, or
            one folder written by :func:`vgen.data.extract.extract_codes`.
        val_fraction: share of each class set aside where there is no ``val``.
        seed: of the split and of the choice among variants.
        tokenizer_hash: fingerprint of the tokenizer that will decode; None skips the check.

    Raises:
        UserError: if the cache is incomplete, damaged, or made by another tokenizer.
    """
    root = existing_folder(path)
    train_folder = root if (root / "manifest.json").exists() else root / "train"
    manifest, train = open_codes(train_folder, augment=True, seed=seed, tokenizer_hash=tokenizer_hash)
    if train_folder != root and (root / "val").is_dir():
        held, val = open_codes(root / "val", augment=False, seed=seed, tokenizer_hash=tokenizer_hash)
        same = ("num_classes", "class_names", "image_size", "grid", "codebook_size", "tokenizer_hash")
        differing = [key for key in same if getattr(held, key) != getattr(manifest, key)]
        if differing:
            raise UserError(f"{root}: train and val differ in {', '.join(differing)}; encode both with one tokenizer")
    else:
        kept, held_out = stratified_split(train.labels, val_fraction, seed)
        train, val = train.subset(kept), train.subset(held_out).without_augmentation()
    return CodeSource(
        name=manifest.source,
        train=train,
        val=val,
        num_classes=manifest.num_classes,
        class_names=manifest.class_names,
        image_size=manifest.image_size,
        grid=manifest.grid,
        codebook_size=manifest.codebook_size,
        tokenizer_hash=manifest.tokenizer_hash,
    )


def open_codes(
    folder: Path, *, augment: bool, seed: int, tokenizer_hash: str | None = None
) -> tuple[Manifest, CodeDataset]:
    """Open one finished cache folder.

    Raises:
        UserError: if it is incomplete, damaged, or made by another tokenizer.
    """
    manifest = Manifest.read(folder)
    if tokenizer_hash is not None and manifest.tokenizer_hash != tokenizer_hash:
        raise UserError(
            f"the codes in {folder} were made by another tokenizer ({manifest.tokenizer_hash[:12]}, not "
            f"{tokenizer_hash[:12]}); choose the tokenizer that made them, or another data.path and encode again"
        )
    if not manifest.complete:
        raise UserError(f"the codes in {folder} are incomplete; run the same encoding again, it continues")
    stored, labels = open_arrays(folder, manifest)
    rows = (labels >= 0).nonzero().flatten()
    check_labels(labels[rows], manifest.num_classes, where=folder)
    if not len(rows):
        raise UserError(f"none of the {manifest.num_images} images behind {folder} could be read; check the data")
    dataset = CodeDataset(
        codes=stored, rows=rows, labels=labels[rows], augment=augment, seed=seed, broken=manifest.broken
    )
    return manifest, dataset


def open_arrays(folder: Path, manifest: Manifest) -> tuple["np.ndarray", Tensor]:
    """Map ``codes.npy`` and read ``labels.npy``, checking both against the manifest.

    Raises:
        UserError: if a file is missing, truncated or of another shape.
    """
    import numpy as np

    try:
        stored = np.load(folder / "codes.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder} is damaged ({error}); delete it and encode again") from error
    shape = (manifest.num_images, manifest.num_variants, manifest.num_tokens)
    if stored.shape != shape or stored.dtype != code_dtype(manifest.codebook_size) or labels.shape != shape[:1]:
        raise UserError(f"{folder}: codes.npy or labels.npy does not fit manifest.json; delete it and encode again")
    return stored, torch.from_numpy(labels)


def code_dtype(codebook_size: int) -> str:
    """Smallest stored integer type for a codebook: uint16 or uint32."""
    return "uint16" if codebook_size <= 65536 else "uint32"


def tokenizer_fingerprint(module: nn.Module) -> str:
    """Hexadecimal SHA-256 of all weights: names, types, shapes and bytes, whatever their order or device."""
    digest = hashlib.sha256()
    state: dict[str, Any] = module.state_dict()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
