"""Pictures and clips in .npz files, in the layout of the ADM suite."""

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.evaluation.pictures import HASHED_AT_ONCE, Pictures


class ArrayPictures(Pictures):
    """``arr_0`` uint8 [n, H, W, 3] (or [n, T, H, W, 3] for clips), optional labels ``arr_1`` [n].

    Stored without compression, as the ADM suite and sample.py write it, the array stays on disk.

    Raises:
        UserError: if the file is damaged or holds something else.
    """

    kind = "npz"

    def __init__(self, path: Path):
        self.name = str(path)
        array = read_array(path, "arr_0")
        if array is None:
            raise UserError(
                f"{path} has no array arr_0 (it holds: {', '.join(array_names(path))}); save it with "
                f"np.savez(path, pictures)"
            )
        self.array = _checked(path, array)
        self.frames = self.array.shape[1] if self.array.ndim == 5 else None
        labels = read_array(path, "arr_1")
        if labels is not None:
            if labels.shape != (len(self.array),) or labels.dtype.kind not in "iu":
                raise UserError(
                    f"{path}: arr_1 is {labels.dtype} {list(labels.shape)}, expected one integer label for each of the "
                    f"{len(self.array)} pictures"
                )
            self.labels = torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        """Number of pictures or clips."""
        return len(self.array)

    def read(self, index: Sequence[int]) -> Tensor:
        """Pictures uint8 [B, 3, H, W], or clips [B, T, 3, H, W], of the given indices."""
        batch = torch.from_numpy(self.array[np.asarray(index)]).movedim(-1, -3)
        return batch.expand(*batch.shape[:-3], 3, -1, -1).contiguous()

    def fingerprint(self) -> str:
        """Hash of the array, whether it is stored compressed or not."""
        digest = hashlib.sha256(repr(self.array.shape).encode())
        for start in range(0, len(self.array), HASHED_AT_ONCE):
            digest.update(np.ascontiguousarray(self.array[start : start + HASHED_AT_ONCE]).data)
        return digest.hexdigest()


def _checked(path: Path, array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        held = (
            f", these hold {array.min():.3g} to {array.max():.3g}" if array.size and array.dtype.kind in "fiu" else ""
        )
        raise UserError(
            f"{path}: arr_0 is {array.dtype}; pictures must be uint8 0..255{held} (vgen.pixels.to_uint8 rounds [-1, 1] "
            f"correctly)"
        )
    if array.ndim not in (4, 5) or array.shape[-1] not in (1, 3):
        raise UserError(
            f"{path}: arr_0 has shape {list(array.shape)}; expected [pictures, height, width, 3] or "
            f"[clips, frames, height, width, 3]"
        )
    if len(array) == 0:
        raise UserError(f"{path}: arr_0 is empty")
    return array


def array_names(path: Path) -> list[str]:
    """Names of the arrays of an .npz file.

    Raises:
        UserError: if it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise _damaged(path, error) from error


def read_array(path: Path, name: str) -> np.ndarray | None:
    """One array of an .npz file, mapped from the disk where it is stored uncompressed; None if it is not there.

    Raises:
        UserError: if the file is damaged or the array holds Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            mapped = _map_member(path, archive.getinfo(f"{name}.npy"))
            if mapped is not None:
                return mapped
            with archive.open(f"{name}.npy") as member:
                return cast(np.ndarray, np.lib.format.read_array(member, allow_pickle=False))
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as an .npz file ({error}); it may be truncated")


def _map_member(path: Path, info: zipfile.ZipInfo) -> np.ndarray | None:
    """Map an uncompressed .npy member from the disk: 50,000 pictures of 256 x 256 are 10 GB. None if compressed."""
    if info.compress_type != zipfile.ZIP_STORED:
        return None
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), dtype="<u2")
        file.seek(info.header_offset + 30 + int(name_length) + int(extra_length))
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            return None
        shape, fortran, dtype = read(file)
        if dtype.hasobject or 0 in shape or not shape:
            return None
        return np.memmap(path, dtype, "c", file.tell(), shape, "F" if fortran else "C")
