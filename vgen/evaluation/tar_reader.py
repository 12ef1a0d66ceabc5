"""Pictures in tar files in the layout of webdataset: ``<key>.png`` beside ``<key>.cls`` with the class number."""

import tarfile
from collections.abc import Sequence
from pathlib import Path

import torch

from vgen.errors import UserError
from vgen.evaluation.pictures import EncodedPictures

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp")


class TarPictures(EncodedPictures):
    """The images of tar shards in the order of the shards and of their members.

    The shards are indexed once and read at any place, so several processes share them exactly, with no sample lost or
    repeated at shard borders. Labels come from ``<key>.cls`` members, if every image has one.

    Raises:
        UserError: naming a shard that is damaged, compressed or holds no image.
    """

    kind = "tar"

    def __init__(self, paths: Sequence[Path], name: str):
        super().__init__()
        self.name = name
        self._images: list[tuple[Path, str, int, int]] = []  # shard, member, offset, size
        labels: list[int | None] = []
        for path in paths:
            images, classes = _index(path)
            self._images += images
            labels += [classes.get(_key(member)) for _, member, _, _ in images]
        if None not in labels:
            self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._images)

    def encoded(self, index: int) -> bytes:
        """The encoded image."""
        path, _, offset, size = self._images[index]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def item_name(self, index: int) -> str:
        """Shard and member."""
        path, member, _, _ = self._images[index]
        return f"{path}:{member}"


def _key(member: str) -> str:
    """Webdataset's key: the path up to the first dot of the file name."""
    folder, slash, name = member.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"


def _index(path: Path) -> tuple[list[tuple[Path, str, int, int]], dict[str, int]]:
    """Images of a shard and the labels by key."""
    images, classes = [], {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                suffix = member.name.rpartition(".")[2].lower()
                if not member.isfile():
                    continue
                if suffix in IMAGE_SUFFIXES:
                    images.append((path, member.name, member.offset_data, member.size))
                elif suffix == "cls":
                    content = archive.extractfile(member)
                    assert content is not None
                    classes[_key(member.name)] = int(content.read())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read as an uncompressed tar file ({error}); copy or unpack it") from error
    except ValueError as error:
        raise UserError(f"{path}: a .cls member is not a class number; webdataset writes it as decimal text") from error
    if not images:
        raise UserError(f"{path} holds no picture (members ending in {', '.join(IMAGE_SUFFIXES)})")
    return images, classes
