"""Encode a data set once into cached codes; may be killed at any moment and continues where it stopped.

A row of ``labels.npy`` is written only after its codes have reached the disk, so the labels say which rows are done:
no other progress record can disagree with the data.
"""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from vgen.data.broken import BrokenImageError
from vgen.data.codes import BROKEN, FORMAT, PENDING, Manifest, code_dtype, codes, open_arrays, tokenizer_fingerprint
from vgen.data.source import CodeSource, DataSource, ImageDataset
from vgen.data.transforms import adm_center_crop, ten_crop, to_tensor
from vgen.errors import UserError
from vgen.pixels import from_uint8
from vgen.runtime import track, writable_folder

if TYPE_CHECKING:
    from vgen.tokenizers.base import Tokenizer

AUGMENTATIONS = ("none", "flip", "shift", "ten_crop")
FLUSH_SECONDS = 10.0


def cache_codes(
    source: DataSource,
    tokenizer: "Tokenizer",
    folder: str | Path,
    *,
    augmentation: str,
    batch_size: int,
    device: torch.device,
    seed: int,
    crop_ratios: tuple[float, ...] = (1.1,),
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> CodeSource:
    """Encode both splits into ``folder/train`` and ``folder/val`` (the latter without augmentation) and open them.

    Finished parts are reused. Arguments as in :func:`extract_codes`; ``seed`` is that of the choice among variants.

    Raises:
        UserError: if the folder holds something else or cannot be written.
    """
    tokenizer_hash = tokenizer_fingerprint(tokenizer)
    for split, dataset in (("train", source.train), ("val", source.val)):
        extract_codes(
            dataset,
            tokenizer,
            Path(folder) / split,
            tokenizer_hash=tokenizer_hash,
            augmentation=augmentation if split == "train" else "none",
            split=split,
            source=source.name,
            num_classes=source.num_classes,
            class_names=source.class_names,
            batch_size=batch_size,
            device=device,
            crop_ratios=crop_ratios,
            num_workers=num_workers,
            rank=rank,
            world_size=world_size,
        )
    # Both splits exist, so no fraction of the training images is set aside.
    return codes(path=str(folder), val_fraction=0.0, seed=seed, tokenizer_hash=tokenizer_hash)


def extract_codes(
    dataset: ImageDataset,
    tokenizer: "Tokenizer",
    folder: str | Path,
    *,
    tokenizer_hash: str,
    augmentation: str,
    split: str,
    source: str,
    num_classes: int,
    class_names: tuple[str, ...],
    batch_size: int,
    device: torch.device,
    crop_ratios: tuple[float, ...] = (1.1,),
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    patience: float = 1800.0,
) -> Manifest:
    """Encode one data set.

    Args:
        dataset: its own augmentation is not used.
        tokenizer: on any device; it is moved to ``device`` and run in float32 and evaluation mode.
        folder: receives codes.npy [images, variants, N], labels.npy [images] and manifest.json.
        tokenizer_hash: from :func:`vgen.data.codes.tokenizer_fingerprint`.
        augmentation: ``none`` (the fixed crop), ``flip`` (and its mirror image), ``shift`` (and its eight moves by one
            pixel over black, for small centred pictures) or ``ten_crop`` (LlamaGen: ADM centre crop to
            int(size * ratio), then four corners, centre and their mirror images, for each ratio).
        split: name kept in the manifest.
        source: name of the data kept in the manifest.
        num_classes: labels are 0..num_classes-1.
        class_names: one per class.
        batch_size: pictures per forward pass.
        device: where the tokenizer runs.
        crop_ratios: of ten-crop; (1.1,) or, as LlamaGen's larger models, (1.1, 1.05).
        num_workers: extra processes that decode images.
        rank: of this process; each encodes its own range of rows, on a file system that all share.
        world_size: number of processes.
        patience: seconds to wait for other processes that make no progress.

    Returns:
        The finished manifest.

    Raises:
        UserError: if the folder holds another cache, or cannot be written, or another process died.
    """
    _check_options(dataset, tokenizer, augmentation, crop_ratios)
    ratios = tuple(crop_ratios) if augmentation == "ten_crop" else ()
    pictures = _Variants(dataset, augmentation, ratios)
    wanted = Manifest(
        format=FORMAT,
        source=source,
        source_hash=dataset.fingerprint(),
        split=split,
        num_images=len(dataset),
        num_classes=num_classes,
        class_names=tuple(class_names),
        image_size=dataset.image_size,
        augmentation=augmentation,
        crop_ratios=ratios,
        num_variants=pictures.num_variants,
        grid=tuple(tokenizer.grid),
        codebook_size=tokenizer.codebook_size,
        tokenizer_hash=tokenizer_hash,
    )
    folder = writable_folder(folder, "codes folder")
    manifest = _prepare(folder, wanted, is_first=rank == 0, patience=patience)
    if manifest.complete:
        return manifest
    blocks = _pending_blocks(folder, manifest, max(1, batch_size // pictures.num_variants), rank, world_size)
    _encode(pictures, tokenizer, folder, manifest, blocks, device=device, num_workers=num_workers)
    return _finish(folder, manifest, dataset, patience=patience)


def _check_options(
    dataset: ImageDataset, tokenizer: "Tokenizer", augmentation: str, crop_ratios: tuple[float, ...]
) -> None:
    if augmentation not in AUGMENTATIONS:
        raise UserError(f"augmentation={augmentation} is unknown; choose one of {', '.join(AUGMENTATIONS)}")
    if tokenizer.image_size != dataset.image_size:
        raise UserError(
            f"the tokenizer encodes {tokenizer.image_size}x{tokenizer.image_size} pixels but the data have "
            f"data.image_size={dataset.image_size}; make them agree"
        )
    frames = getattr(dataset, "num_frames", None)
    if tokenizer.num_frames != frames:
        raise UserError(
            f"the tokenizer encodes {_kind(tokenizer.num_frames)} but the data are {_kind(frames)}; make "
            "data.num_frames and tokenizer.num_frames agree"
        )
    if augmentation == "ten_crop" and frames is not None:
        raise UserError("augmentation=ten_crop is for pictures; use flip or none for clips")
    if augmentation == "ten_crop" and (not crop_ratios or min(crop_ratios) < 1):
        raise UserError(f"crop_ratios={crop_ratios} must be at least 1 (LlamaGen: 1.1)")


def _kind(frames: int | None) -> str:
    return "pictures" if frames is None else f"clips of {frames} frames"


class _Variants:
    """The pictures to encode: uint8 [B, variants, 3, S, S] with rows and labels; broken images are black.

    Clips are [B, variants, 3, T, S, S].
    """

    def __init__(self, dataset: ImageDataset, augmentation: str, ratios: tuple[float, ...]):
        self._dataset, self._augmentation, self._ratios = dataset, augmentation, ratios
        self.num_variants = {"none": 1, "flip": 2, "shift": 9, "ten_crop": 10 * len(ratios)}[augmentation]

    def __len__(self) -> int:
        return len(self._dataset)

    def _stack(self, row: int) -> Tensor:
        if self._augmentation == "ten_crop":
            image, size = self._dataset.raw(row), self._dataset.image_size
            crops = [crop for r in self._ratios for crop in ten_crop(adm_center_crop(image, int(size * r)), size)]
            return torch.stack([to_tensor(crop) for crop in crops])
        picture = self._dataset.picture(row)
        if self._augmentation == "shift":
            size, padded = self._dataset.image_size, F.pad(picture, (1, 1, 1, 1))
            moves = [(down, right) for down in (1, 0, 2) for right in (1, 0, 2)]
            return torch.stack([padded[..., down : down + size, right : right + size] for down, right in moves])
        return torch.stack([picture, picture.flip(-1)] if self._augmentation == "flip" else [picture])

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        size, frames = self._dataset.image_size, getattr(self._dataset, "num_frames", None)
        shape = (size, size) if frames is None else (frames, size, size)
        try:
            return self._stack(row), int(self._dataset.labels[row])
        except BrokenImageError:
            return torch.zeros(self.num_variants, 3, *shape, dtype=torch.uint8), BROKEN

    def __getitems__(self, rows: list[int]) -> tuple[int, Tensor, Tensor]:
        items = [self[row] for row in rows]
        return rows[0], torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items])


def _prepare(folder: Path, wanted: Manifest, *, is_first: bool, patience: float) -> Manifest:
    """Reuse the cache in the folder or create an empty one; processes other than the first wait for it."""
    import numpy as np

    path = folder / "manifest.json"
    if is_first and not path.exists():
        shape = (wanted.num_images, wanted.num_variants, wanted.num_tokens)
        dtype = np.dtype(code_dtype(wanted.codebook_size))
        needed, free = int(np.prod(shape)) * dtype.itemsize, shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"{folder} needs {needed / 2**30:.1f} GiB but only {free / 2**30:.1f} GiB are free; free some space or "
                "choose another folder"
            )
        np.lib.format.open_memmap(folder / "codes.npy", mode="w+", dtype=dtype, shape=shape).flush()
        np.save(folder / "labels.npy", np.full(wanted.num_images, PENDING, dtype=np.int64))
        wanted.write(folder)
    deadline = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(f"{folder}: the first process created no cache; look at its messages and start again")
        time.sleep(0.1)
    found = Manifest.read(folder)
    differing = found.differences(wanted)
    if differing:
        facts = "; ".join(f"{key} {_short(getattr(found, key))} vs {_short(getattr(wanted, key))}" for key in differing)
        raise UserError(f"{folder} holds other codes ({facts}); delete it or choose another folder")
    open_arrays(folder, found)
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _pending_blocks(folder: Path, manifest: Manifest, rows: int, rank: int, world_size: int) -> list[list[int]]:
    """Blocks of rows of this process that are not finished.

    Blocks start at multiples of ``rows`` in every run, so a resumed run feeds the tokenizer exactly the batches of an
    uninterrupted one and gets the same numbers.
    """
    labels = open_arrays(folder, manifest)[1]
    count = -(-manifest.num_images // rows)
    mine = range(rank * count // world_size, (rank + 1) * count // world_size)
    blocks = [range(block * rows, min((block + 1) * rows, manifest.num_images)) for block in mine]
    return [list(block) for block in blocks if (labels[block.start : block.stop] == PENDING).any()]


def _encode(
    pictures: _Variants,
    tokenizer: "Tokenizer",
    folder: Path,
    manifest: Manifest,
    blocks: list[list[int]],
    *,
    device: torch.device,
    num_workers: int,
) -> None:
    was_training = tokenizer.training
    tokenizer.to(device).eval()
    loader: DataLoader = DataLoader(
        cast(Dataset, pictures),
        batch_sampler=blocks,
        collate_fn=_as_is,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        # Its own generator: encoding must not advance the global one before training starts.
        generator=torch.Generator(),
    )
    with torch.inference_mode(), _Writer(folder, manifest) as writer:
        batches: Iterator[tuple[int, Tensor, Tensor]] = track(loader, f"encoding {manifest.split}", unit="batch")
        for first, stack, labels in batches:
            pixels = from_uint8(stack.flatten(0, 1).to(device, non_blocking=True))
            ids = tokenizer.encode(pixels).view(*stack.shape[:2], manifest.num_tokens)
            writer.add(first, ids.cpu(), labels)
    tokenizer.train(was_training)


def _as_is(batch: Any) -> Any:
    return batch


class _Writer:
    """Writes finished rows: codes, then, once those are on the disk, their labels.

    Plain file writes rather than a writable memory map: on network file systems a map writes whole pages back and two
    machines could overwrite each other's rows in the page they share.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        import numpy as np

        self._dtype = np.dtype(code_dtype(manifest.codebook_size))
        self._codebook_size = manifest.codebook_size
        self._row_bytes = manifest.num_variants * manifest.num_tokens * self._dtype.itemsize
        self._offsets = [np.load(folder / name, mmap_mode="r").offset for name in ("codes.npy", "labels.npy")]
        self._codes = (folder / "codes.npy").open("r+b", buffering=0)
        self._labels = (folder / "labels.npy").open("r+b", buffering=0)
        self._waiting: list[tuple[int, Tensor]] = []
        self._flushed = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
        self._codes.close()
        self._labels.close()

    def add(self, first: int, ids: Tensor, labels: Tensor) -> None:
        """Write rows ``first`` and following: ids int64 [b, variants, N], labels int64 [b]."""
        assert int(ids.min()) >= 0
        assert int(ids.max()) < self._codebook_size
        self._codes.seek(self._offsets[0] + first * self._row_bytes)
        _write_all(self._codes, ids.numpy().astype(self._dtype).tobytes())
        self._waiting.append((first, labels))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Make everything added so far permanent."""
        os.fsync(self._codes.fileno())
        for first, labels in self._waiting:
            self._labels.seek(self._offsets[1] + first * 8)
            _write_all(self._labels, labels.numpy().tobytes())
        os.fsync(self._labels.fileno())
        self._waiting.clear()
        self._flushed = time.monotonic()


def _write_all(file: Any, data: bytes) -> None:
    """Write to an unbuffered file, which may take less than it is given (at most 2 GiB at a time on Linux)."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _finish(folder: Path, manifest: Manifest, dataset: ImageDataset, *, patience: float) -> Manifest:
    """Wait until all processes have encoded their rows, then complete the manifest."""
    least, deadline = manifest.num_images + 1, 0.0
    while True:
        labels = open_arrays(folder, manifest)[1]
        pending = int((labels == PENDING).sum())
        if not pending:
            break
        if pending < least:
            least, deadline = pending, time.monotonic() + patience
        if time.monotonic() > deadline:
            raise UserError(f"{folder}: {pending} images were left by another process; start the encoding again")
        time.sleep(0.2)
    broken = (labels == BROKEN).nonzero().flatten().tolist()
    names = (*dataset.broken, *(dataset.name(row) for row in broken))
    finished = replace(manifest, complete=True, done=manifest.num_images, broken=names)
    finished.write(folder)
    return finished
