"""Pictures to score, whatever they are stored in: a folder, an .npz file, a data set."""

import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from vgen.data.source import ImageDataset
from vgen.errors import UserError
from vgen.pixels import to_uint8

SAMPLES_JSON = "samples.json"  # written by sample.py beside its pictures
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Pictures(ABC):
    """A finite set of 8-bit pictures of one size.

    Attributes:
        name: what messages and reports call it.
        labels: int64 [n] class of every picture, None if unknown.
        kind: how it is stored (``folder``, ``npz``, ``dataset``).
        origin: what is known about how the pictures were made.
    """

    name: str
    kind: str
    labels: Tensor | None = None
    origin: dict | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of pictures."""

    @abstractmethod
    def read(self, index: Sequence[int]) -> Tensor:
        """Pictures uint8 [B, 3, H, W] of the given indices."""


class FolderPictures(Pictures):
    """Image files of a folder, sorted by path.

    Labels come from sub-folders named by the class number or by a name in ``class_names``.
    """

    kind = "folder"

    def __init__(self, folder: Path, class_names: Sequence[str] = ()):
        self.name = str(folder)
        self.files = sorted(
            (p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file()), key=lambda p: str(p)
        )
        if not self.files:
            raise UserError(
                f"{folder} holds no picture ({', '.join(EXTENSIONS)}); give a folder of images or an .npz file"
            )
        self.labels = self._labels_from_folders(folder, list(class_names))
        self.size: tuple[int, ...] | None = None

    def _labels_from_folders(self, folder: Path, names: list[str]) -> Tensor | None:
        labels = []
        for file in self.files:
            parent = file.relative_to(folder).parts[0] if file.parent != folder else ""
            if parent in names:
                labels.append(names.index(parent))
            elif parent.isdecimal():
                labels.append(int(parent))
            else:
                return None
        return torch.tensor(labels)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.files)

    def read(self, index: Sequence[int]) -> Tensor:
        """Pictures uint8 [B, 3, H, W] of the given indices.

        Raises:
            UserError: naming a file that cannot be read, or whose size differs from the others'.
        """
        pictures = []
        for i in index:
            picture = read_picture(self.files[i])
            if self.size is None:
                self.size = tuple(picture.shape)
            if picture.shape != self.size:
                raise UserError(
                    f"{self.files[i]} is {picture.shape[2]}x{picture.shape[1]} but the pictures before it are "
                    f"{self.size[2]}x{self.size[1]}; all pictures of a set must have one size"
                )
            pictures.append(picture)
        return torch.stack(pictures)


def read_picture(path: Path) -> Tensor:
    """Read one image file as uint8 [3, H, W]; grey and palette pictures become RGB.

    Raises:
        UserError: naming a file that is truncated, not an image, transparent or deeper than 8 bits.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            file.load()
            image: Image.Image = file
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error}); replace or remove the file") from error
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise UserError(f"{path} has transparent pixels; flatten it onto a background first")
    elif image.mode not in ("RGB", "L", "P", "1"):
        raise UserError(f"{path} has pixel mode {image.mode}; only 8-bit RGB and grey pictures can be scored")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


class ArrayPictures(Pictures):
    """An .npz file in the layout of the ADM suite: ``arr_0`` uint8 [n, H, W, 3], optional labels ``arr_1`` [n]."""

    kind = "npz"

    def __init__(self, path: Path):
        self.name = str(path)
        self.array = self._checked(path, self._open(path, "arr_0"))
        labels = self._open(path, "arr_1", optional=True)
        if labels is not None:
            if labels.shape != (len(self.array),) or labels.dtype.kind not in "iu":
                raise UserError(
                    f"{path}: arr_1 is {labels.dtype} {list(labels.shape)}, expected one integer label for each of the "
                    f"{len(self.array)} pictures"
                )
            self.labels = torch.from_numpy(labels.astype(np.int64))

    @staticmethod
    def _open(path: Path, key: str, *, optional: bool = False) -> np.ndarray | None:
        try:
            with zipfile.ZipFile(path) as archive:
                if f"{key}.npy" not in archive.namelist():
                    if optional:
                        return None
                    keys = ", ".join(n.removesuffix(".npy") for n in archive.namelist())
                    raise UserError(
                        f"{path} has no array arr_0 (it holds: {keys}); save it with np.savez(path, pictures)"
                    )
                mapped = _map_member(path, archive.getinfo(f"{key}.npy"))
                if mapped is not None:
                    return mapped
                with archive.open(f"{key}.npy") as member:
                    return cast(np.ndarray, np.lib.format.read_array(member, allow_pickle=False))
        except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} cannot be read as an .npz file ({error}); it may be truncated") from error

    @staticmethod
    def _checked(path: Path, array: np.ndarray | None) -> np.ndarray:
        assert array is not None
        if array.dtype != np.uint8:
            raise UserError(
                f"{path}: arr_0 is {array.dtype}; pictures must be uint8 0..255 (vgen.pixels.to_uint8 rounds correctly)"
            )
        if array.ndim != 4 or array.shape[3] not in (1, 3):
            raise UserError(f"{path}: arr_0 has shape {list(array.shape)}; expected [pictures, height, width, 3]")
        if len(array) == 0:
            raise UserError(f"{path}: arr_0 is empty")
        return array

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.array)

    def read(self, index: Sequence[int]) -> Tensor:
        """Pictures uint8 [B, 3, H, W] of the given indices."""
        batch = torch.from_numpy(self.array[np.asarray(index)]).permute(0, 3, 1, 2)
        return batch.expand(-1, 3, -1, -1).contiguous()


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
        if dtype.hasobject or 0 in shape:
            return None
        return np.memmap(path, dtype, "c", file.tell(), shape, "F" if fortran else "C")


class DatasetPictures(Pictures):
    """The pictures of a data set, in its order and without augmentation."""

    kind = "dataset"

    def __init__(self, dataset: ImageDataset, name: str):
        self.name = name
        self.dataset = dataset.without_augmentation()
        self.labels = self.dataset.labels
        if len(self.dataset) == 0:
            raise UserError(f"{name} is empty")

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.dataset)

    def read(self, index: Sequence[int]) -> Tensor:
        """Pictures uint8 [B, 3, H, W] of the given indices.

        Raises:
            UserError: naming a picture that cannot be read: a stand-in for it would be scored twice.
        """
        batch = self.dataset.__getitems__([(i, 0) for i in index])
        if batch.get("broken"):
            raise UserError(f"{self.name}: {batch['broken'][0]} cannot be read; replace or remove it")
        return to_uint8(batch["pixels"])


class Subset(Pictures):
    """Some pictures of a set, in the order of ``index``."""

    def __init__(self, pictures: Pictures, index: Sequence[int], name: str):
        self.pictures = pictures
        self.index = list(index)
        self.name = name
        self.kind = pictures.kind
        self.origin = pictures.origin
        if pictures.labels is not None:
            self.labels = pictures.labels[torch.tensor(self.index)]

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.index)

    def read(self, index: Sequence[int]) -> Tensor:
        """Pictures uint8 [B, 3, H, W] of the given indices."""
        return self.pictures.read([self.index[i] for i in index])


def _open_samples(folder: Path) -> Pictures:
    """The samples that sample.py wrote to a folder, with the labels it asked for."""
    try:
        document = json.loads((folder / SAMPLES_JSON).read_text())
        labels = torch.tensor(document.pop("labels"), dtype=torch.int64)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / SAMPLES_JSON} is damaged; repeat the sample.py command in a new folder") from error
    archive = folder / "samples.npz"
    pictures: Pictures = ArrayPictures(archive) if archive.is_file() else FolderPictures(folder / "images")
    if len(labels) != len(pictures):
        raise UserError(f"{pictures.name} holds {len(pictures)} pictures but {SAMPLES_JSON} lists {len(labels)} labels")
    pictures.labels, pictures.origin = labels, document
    return pictures


def open_pictures(path: str | Path, *, key: str, class_names: Sequence[str] = ()) -> Pictures:
    """Open a folder of images, an .npz file or a folder that sample.py wrote.

    Args:
        path: folder or file.
        key: configuration key the path came from, for messages.
        class_names: names that label sub-folders.

    Raises:
        UserError: if the path is missing, of another kind or holds no picture.
    """
    path = Path(path).expanduser()
    if (path / SAMPLES_JSON).is_file():
        return _open_samples(path)
    if (path / "partial" / "identity.json").is_file():
        raise UserError(f"{key}={path} holds unfinished samples; repeat the sample.py command that makes them")
    if path.is_dir():
        return FolderPictures(path, class_names)
    if not path.exists():
        raise UserError(f"{key}={path} does not exist; give a folder of images or an .npz file")
    if path.suffix != ".npz":
        raise UserError(f"{key}={path} is neither a folder nor an .npz file")
    return ArrayPictures(path)
