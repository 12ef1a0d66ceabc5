"""A folder that samples are streamed into: constant memory, resumable after a kill, shared by processes of one host."""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.media import save_frames, save_gif, save_mp4
from vgen.sampling.pipeline import SampleBatch

PICTURE_FORMATS, CLIP_FORMATS = ("npz", "png"), ("npz", "mp4", "gif", "frames")


def formats_of(fmt: str | Sequence[str], *, clips: bool) -> tuple[str, ...]:
    """The formats that samples are written in.

    Args:
        fmt: one of ``npz`` (all in one archive, without loss), ``png`` (pictures), ``mp4``, ``gif`` and ``frames``
            (clips; the last a folder of PNG files per clip), or several; ``both`` is npz and png, or npz and mp4.
        clips: samples are clips.

    Raises:
        UserError: for a format that is unknown or not for such samples.
    """
    possible = CLIP_FORMATS if clips else PICTURE_FORMATS
    chosen = possible[:2] if fmt == "both" else (fmt,) if isinstance(fmt, str) else tuple(fmt)
    wrong = [name for name in chosen if name not in possible]
    if wrong or not chosen:
        what = "clips" if clips else "pictures"
        raise UserError(f"format={fmt} is not possible for {what}; choose of {', '.join(possible)} or both")
    return chosen


class SampleStore:
    """Memory-mapped pictures or clips with a flag per finished sample.

    A sample is flagged only after its pixels are written, so a killed run loses nothing and makes again at most the
    batches that were not written yet. All disk space is reserved when the store is made.

    Args:
        folder: output folder.
        labels: int64 [num_samples].
        sample_shape: (H, W) of the pictures or (T, H, W) of the clips.
        identity: everything the samples depend on; a folder with another identity is refused.
        fmt: see :func:`formats_of`.
        fps: frames per second of clips in viewable files.
        create: make the files if they are absent (process 0); otherwise they must exist.

    Raises:
        UserError: if the folder holds samples of another run, or cannot be written or reserved.
    """

    def __init__(
        self,
        folder: Path,
        *,
        labels: Tensor,
        sample_shape: tuple[int, ...],
        identity: dict[str, Any],
        fmt: str | Sequence[str],
        fps: float = 8.0,
        create: bool = True,
    ) -> None:
        self.folder, self.labels, self.fps = folder, labels, fps
        self.formats = formats_of(fmt, clips=len(sample_shape) == 3)
        self.partial = folder / "partial"
        self.identity = {**identity, "labels_sha256": hashlib.sha256(labels.numpy().tobytes()).hexdigest()}
        self._check_identity()
        shape = (len(labels), *sample_shape, 3)
        if create and not self.finished:
            self._create(shape)
        if not self.finished:
            self.images = np.load(self.partial / "images.npy", mmap_mode="r+")
            self.flags = np.load(self.partial / "done.npy", mmap_mode="r+")

    @property
    def finished(self) -> bool:
        """An earlier run of the same command completed the folder."""
        return (self.folder / "samples.json").is_file()

    @property
    def done(self) -> Tensor:
        """Bool [num_samples], samples that are on disk."""
        return torch.from_numpy(np.array(self.flags, dtype=bool))

    def _check_identity(self) -> None:
        for path in (self.folder / "samples.json", self.partial / "identity.json"):
            if path.is_file():
                found = json.loads(path.read_text())
                found = found.get("identity", found)
                changed = [key for key in self.identity if found.get(key) != self.identity[key]]
                if changed:
                    raise UserError(
                        f"out={self.folder} holds samples of another run (different {', '.join(changed)}); "
                        "choose another folder or delete it"
                    )

    def _create(self, shape: tuple[int, ...]) -> None:
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            if not (self.partial / "identity.json").is_file():
                for name, size in (("images.npy", shape), ("done.npy", shape[:1])):
                    _reserve(self.partial / name, size)
                _write_text(self.partial / "identity.json", json.dumps(self.identity, indent=2))
        except OSError as error:
            need = int(np.prod(shape)) / 2**30
            raise UserError(
                f"out={self.folder} cannot hold {shape[0]} samples ({need:.2f} GiB): {error.strerror}; free space or "
                "choose another folder"
            ) from error

    def write(self, batch: SampleBatch) -> None:
        """Store finished samples, then flag them.

        Raises:
            UserError: if a picture cannot be written; finished samples stay.
        """
        index = batch.index.numpy()
        self.images[index] = batch.images.movedim(1, -1).numpy()
        self._write_files(batch)
        self.images.flush()
        self.flags[index] = 1
        self.flags.flush()

    def _write_sample(self, index: int, sample: Tensor) -> None:
        """One sample, uint8 [3, H, W] or [3, T, H, W], in every format of single files."""
        from PIL import Image

        name = f"{index:06d}"
        if "png" in self.formats:
            (self.folder / "images").mkdir(exist_ok=True)
            picture = sample.permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(picture).save(self.folder / "images" / f"{name}.png")
        if "mp4" in self.formats:
            save_mp4(sample, self.folder / "mp4" / f"{name}.mp4", fps=self.fps)
        if "gif" in self.formats:
            save_gif(sample, self.folder / "gif" / f"{name}.gif", fps=self.fps)
        if "frames" in self.formats:
            save_frames(sample, self.folder / "frames" / name)

    def _write_files(self, batch: SampleBatch) -> None:
        try:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # compression runs outside of Python's lock
                list(pool.map(self._write_sample, batch.index.tolist(), batch.images))
        except (OSError, UserError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"{self.folder} cannot be written ({reason}); {int(self.flags.sum())} samples are safe: free space and "
                "repeat the command to go on"
            ) from error

    def finish(self, report: dict[str, Any]) -> None:
        """Pack the npz and write ``samples.json``; the working files go away.

        Raises:
            UserError: if samples are missing or the archive cannot be written.
        """
        missing = int((~self.done).sum())
        if missing:
            raise UserError(f"{missing} of {len(self.labels)} samples are missing in {self.folder}; repeat the command")
        try:
            if "npz" in self.formats:
                np.save(self.partial / "labels.npy", self.labels.numpy())
                archive = self.folder / "samples.npz"
                with zipfile.ZipFile(archive.with_suffix(".partial"), "w", zipfile.ZIP_STORED, allowZip64=True) as file:
                    file.write(self.partial / "images.npy", "arr_0.npy")
                    file.write(self.partial / "labels.npy", "arr_1.npy")
                archive.with_suffix(".partial").replace(archive)
            document = {"identity": self.identity, **report, "labels": self.labels.tolist()}
            _write_text(self.folder / "samples.json", json.dumps(document))
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror}); all samples are safe: free space and repeat the "
                "command to go on"
            ) from error
        shutil.rmtree(self.partial)

    def pictures(self, index: Tensor) -> Tensor:
        """Stored samples as uint8 [n, 3, H, W] or [n, 3, T, H, W]."""
        return torch.from_numpy(np.array(self.images[index.numpy()])).movedim(-1, 1)


def grid_order(labels: Tensor, num_classes: int, limit: int) -> tuple[Tensor, int]:
    """Which samples to show, one column per class when that fits.

    Args:
        labels: int64 [num_samples].
        num_classes: number of classes.
        limit: largest number of pictures.

    Returns:
        Sample indices int64 [n], row by row, and the number of columns.
    """
    classes = labels.unique().tolist()
    if 1 < len(classes) <= 16:
        members = [torch.nonzero(labels == label).flatten() for label in classes]
        rows = min(max(1, limit // len(classes)), min(len(m) for m in members))
        return torch.stack([m[:rows] for m in members], dim=1).flatten(), len(classes)
    count = min(limit, len(labels))
    return torch.arange(count), max(1, round(count**0.5))


def _reserve(path: Path, shape: tuple[int, ...]) -> None:
    """Make an all-zero uint8 .npy whose space is really allocated, so that a full disk is noticed now."""
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(text)
    partial.replace(path)
