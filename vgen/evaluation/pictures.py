"""What every set of pictures or clips to score can do, and the guards they share."""

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vgen.errors import UserError

HASHED_AT_ONCE = 64  # pictures


class Pictures(ABC):
    """A finite set of 8-bit pictures, or of clips, of one size.

    Attributes:
        name: what messages and reports call it.
        kind: how it is stored (``folder``, ``npz``, ``tar``, ``parquet``, ``dataset``, ``videos``).
        labels: int64 [n] class of every item, None if unknown.
        origin: what is known about how the items were made.
        frames: frames of every clip, None for pictures.
    """

    name: str
    kind: str
    labels: Tensor | None = None
    origin: dict | None = None
    frames: int | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of pictures or clips."""

    @abstractmethod
    def read(self, index: Sequence[int]) -> Tensor:
        """Pictures uint8 [B, 3, H, W], or clips uint8 [B, T, 3, H, W], of the given indices."""

    def fingerprint(self) -> str:
        """Hexadecimal hash of the content, equal for equal items in equal order."""
        digest = hashlib.sha256(f"{len(self)} {self.frames}".encode())
        for start in range(0, len(self), HASHED_AT_ONCE):
            batch = self.read(range(start, min(start + HASHED_AT_ONCE, len(self))))
            digest.update(f"{tuple(batch.shape[1:])}".encode())
            digest.update(batch.numpy().tobytes())
        return digest.hexdigest()


class EncodedPictures(Pictures):
    """Pictures kept as encoded image files somewhere; decoded and compared in size when read."""

    def __init__(self) -> None:
        self._first: tuple[int, ...] | None = None

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The encoded image."""

    @abstractmethod
    def item_name(self, index: int) -> str:
        """Name of an image in messages."""

    def read(self, index: Sequence[int]) -> Tensor:
        """Pictures uint8 [B, 3, H, W] of the given indices.

        Raises:
            UserError: naming an image that cannot be read, or whose size differs from the others'.
        """
        pictures = []
        for i in index:
            name = self.item_name(i)
            picture = decode_picture(self.encoded(i), name)
            self._first = self._first or tuple(picture.shape)
            if picture.shape != self._first:
                raise UserError(
                    f"{name} is {picture.shape[2]}x{picture.shape[1]} but the pictures before it are "
                    f"{self._first[2]}x{self._first[1]}; all pictures of a set must have one size"
                )
            pictures.append(picture)
        return torch.stack(pictures)

    def fingerprint(self) -> str:
        """Hash of the encoded images."""
        digest = hashlib.sha256(str(len(self)).encode())
        for i in range(len(self)):
            digest.update(hashlib.sha256(self.encoded(i)).digest())
        return digest.hexdigest()


class Subset(Pictures):
    """Some items of a set, in the order of ``index``."""

    def __init__(self, pictures: Pictures, index: Sequence[int], name: str):
        self.pictures = pictures
        self.index = list(index)
        self.name = name
        self.kind, self.origin, self.frames = pictures.kind, pictures.origin, pictures.frames
        if pictures.labels is not None:
            self.labels = pictures.labels[torch.tensor(self.index)]

    def __len__(self) -> int:
        """Number of items."""
        return len(self.index)

    def read(self, index: Sequence[int]) -> Tensor:
        """Items of the given indices."""
        return self.pictures.read([self.index[i] for i in index])

    def fingerprint(self) -> str:
        """Hash of the whole set and of which items are taken."""
        return hashlib.sha256(f"{self.pictures.fingerprint()} {self.index}".encode()).hexdigest()


class Joined(Pictures):
    """Several sets behind each other, for example the shards of a sampling job."""

    def __init__(self, parts: Sequence[Pictures], name: str):
        self.parts, self.name, self.kind = list(parts), name, parts[0].kind
        self.frames = parts[0].frames
        self._ends = np.cumsum([len(part) for part in parts])
        odd = next((part for part in parts if part.frames != self.frames), None)
        if odd is not None:
            raise UserError(f"{odd.name} has clips of {odd.frames} frames, {parts[0].name} of {self.frames}")
        labels = [part.labels for part in parts]
        if all(part is not None for part in labels):
            self.labels = torch.cat([part for part in labels if part is not None])

    def __len__(self) -> int:
        """Number of items."""
        return int(self._ends[-1])

    def read(self, index: Sequence[int]) -> Tensor:
        """Items of the given indices.

        Raises:
            UserError: if the parts hold items of different sizes.
        """
        rows = []
        for i in index:
            number = int(np.searchsorted(self._ends, i, side="right"))
            start = int(self._ends[number - 1]) if number else 0
            rows.append(self.parts[number].read([i - start]))
            if rows[-1].shape != rows[0].shape:
                raise UserError(
                    f"{self.parts[number].name} holds items of shape {list(rows[-1].shape[1:])}, those before it "
                    f"{list(rows[0].shape[1:])}; all items of a set must have one size"
                )
        return torch.cat(rows)


def decode_picture(data: bytes, name: str) -> Tensor:
    """Decode one image as uint8 [3, H, W]; grey and palette pictures become RGB.

    Args:
        data: the encoded image.
        name: for messages.

    Raises:
        UserError: naming an image that is empty, truncated, not an image, transparent or deeper than 8 bits.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise UserError(f"{name} cannot be read as a picture (it is empty); replace or remove it")
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            image: Image.Image = file
    except UnidentifiedImageError as error:
        raise UserError(f"{name} cannot be read as a picture (unknown format); replace or remove it") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} cannot be read as a picture ({error}); replace or remove it") from error
    if getattr(image, "n_frames", 1) > 1:
        raise UserError(f"{name} is animated; score it as a video file, or take one frame out of it")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise UserError(f"{name} has transparent pixels; flatten it onto a background first")
    elif image.mode not in ("RGB", "L", "P", "1"):
        raise UserError(f"{name} has pixel mode {image.mode}; only 8-bit RGB and grey pictures can be scored")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def read_picture(path: Path) -> Tensor:
    """Read one image file as uint8 [3, H, W]; see :func:`decode_picture`.

    Raises:
        UserError: naming the file.
    """
    return decode_picture(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """Content of a file.

    Raises:
        UserError: naming a file that cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from error


class RangeGuard:
    """Notices pictures in [0, 1] that were stored as 8 bits without scaling, mixed with others or not.

    Such a picture holds the values 0 and 1 and no other; a black one holds 0 only and is not counted.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.binary = 0

    def update(self, items: Tensor) -> None:
        """Look at uint8 items [B, ...]."""
        self.seen += len(items)
        self.binary += int((items.flatten(1).amax(1) == 1).sum())

    @staticmethod
    def check(seen: int, binary: int, name: str) -> str | None:
        """Judge the counts of a whole set.

        Returns:
            A warning for a few suspicious pictures, None without any.

        Raises:
            UserError: if one picture in ten or more has the wrong range.
        """
        if not binary:
            return None
        found = f"{binary} of {seen} pictures of {name} hold only the values 0 and 1"
        if binary * 10 >= seen:
            mixed = "" if binary == seen else ", mixed with others in [0, 255]"
            raise UserError(
                f"{found}{mixed}: they were in [0, 1] and stored without scaling; write them with vgen.pixels.to_uint8"
            )
        return found


def labels_of_folders(paths: Iterable[str], class_names: Sequence[str]) -> Tensor | None:
    """Labels from the first folder of relative paths, a class number or a class name; None if any path lacks one.

    Args:
        paths: relative paths with ``/``.
        class_names: names that stand for 0, 1, ...
    """
    names = {name: i for i, name in enumerate(class_names)}
    labels = []
    for path in paths:
        first, _, rest = path.partition("/")
        if rest and first in names:
            labels.append(names[first])
        elif rest and first.isdecimal():
            labels.append(int(first))
        else:
            return None
    return torch.tensor(labels)
