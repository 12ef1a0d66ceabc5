"""Small data sets held in memory as 8-bit arrays; a batch is a few vectorised operations."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from vgen.data.source import Batch, Draws
from vgen.pixels import from_uint8
from vgen.random import keyed_uniform

if TYPE_CHECKING:
    from PIL.Image import Image

FLIP, SHIFT_DOWN, SHIFT_RIGHT = range(3)
"""Independent random streams of one draw."""


@dataclass(frozen=True, kw_only=True)
class ArrayImages:
    """Pictures in memory; fulfils :class:`vgen.data.source.ImageDataset`.

    Attributes:
        pictures: uint8 [n, C, S, S], C = 3, or 1 for grey pictures (repeated to 3 channels in a batch).
        labels: int64 [n].
        flip: mirror each draw with probability 1/2.
        shift: move each draw by up to this many pixels in both directions, filling with black.
        seed: of the augmentation.
        names: of the pictures; their numbers when empty.
        broken: names of pictures left out because they were unreadable.
    """

    pictures: Tensor
    labels: Tensor
    flip: bool = False
    shift: int = 0
    seed: int = 0
    names: Sequence[str] = field(default=(), repr=False)
    broken: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = self.pictures.shape
        assert self.pictures.dtype == torch.uint8
        assert self.labels.dtype == torch.int64
        assert len(shape) == 4
        assert shape[1] in (1, 3)
        assert shape[2] == shape[3]
        assert len(self.labels) == len(self.pictures)

    @property
    def image_size(self) -> int:
        """Side of the square pictures in pixels."""
        return self.pictures.shape[-1]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return {"pixels": from_uint8(self.picture(index)), "label": self.labels[index], "index": torch.tensor(index)}

    def __getitems__(self, draws: Draws) -> Batch:
        index, draw = torch.as_tensor(draws, dtype=torch.int64).unbind(1)
        pictures = self.pictures.index_select(0, index)
        if self.shift:
            pictures = _shifted(pictures, self.shift, self.seed, draw)
        if self.flip:
            # Little extra memory on purpose: when a batch frees more than glibc keeps, every batch faults its pages in
            # again, which costs ten times the arithmetic. The same holds for the in-place form of from_uint8 below.
            mirrored = (keyed_uniform(self.seed, draw, FLIP) < 0.5).nonzero().flatten().numpy()
            array = pictures.numpy()
            array[mirrored] = array[mirrored, ..., ::-1]
        if pictures.shape[1] == 1:
            pictures = pictures.expand(-1, 3, -1, -1)
        pixels = pictures.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
        return {"pixels": pixels, "label": self.labels[index], "index": index}

    def raw(self, index: int) -> "Image":
        """The stored picture as RGB image."""
        from PIL import Image

        return Image.fromarray(self.picture(index).permute(1, 2, 0).contiguous().numpy())

    def picture(self, index: int) -> Tensor:
        """The stored picture as uint8 [3, S, S]."""
        return self.pictures[index].expand(3, -1, -1)

    def name(self, index: int) -> str:
        """The name of a picture in messages."""
        return self.names[index] if len(self.names) else f"image {index}"

    def subset(self, indices: Tensor) -> Self:
        """The pictures at ``indices`` (int64 [m])."""
        names = tuple(self.name(int(i)) for i in indices)
        return replace(self, pictures=self.pictures[indices], labels=self.labels[indices], names=names)

    def without_augmentation(self) -> Self:
        """The same pictures, never flipped or shifted."""
        return replace(self, flip=False, shift=0)

    def fingerprint(self) -> str:
        """Hash of all pictures and labels."""
        digest = hashlib.sha256(repr(tuple(self.pictures.shape)).encode())
        digest.update(self.pictures.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()


def resize_pictures(pictures: Tensor, size: int) -> Tensor:
    """Resize with antialiased bicubic.

    Args:
        pictures: uint8 or float [n, C, H, W], values 0..255.
        size: side of the square results in pixels.

    Returns:
        uint8 [n, C, size, size].
    """
    if pictures.shape[-2:] == (size, size) and pictures.dtype == torch.uint8:
        return pictures

    def resize(block: Tensor) -> Tensor:
        block = F.interpolate(block.float(), size=(size, size), mode="bicubic", antialias=True)
        return block.round().clamp(0, 255).to(torch.uint8)

    # In blocks, because the float copy of a whole set is four times its size.
    return torch.cat([resize(block) for block in pictures.split(4096)])


def _shifted(pictures: Tensor, reach: int, seed: int, draw: Tensor) -> Tensor:
    """Move each picture [B, C, S, S] by up to ``reach`` pixels; the edges revealed are black."""
    batch, channels, size, _ = pictures.shape
    span = torch.arange(size)
    down = (keyed_uniform(seed, draw, SHIFT_DOWN) * (2 * reach + 1)).long()
    right = (keyed_uniform(seed, draw, SHIFT_RIGHT) * (2 * reach + 1)).long()
    padded = F.pad(pictures, (reach,) * 4)
    rows = (down[:, None] + span)[:, None, :, None]
    columns = (right[:, None] + span)[:, None, None, :]
    return padded[torch.arange(batch)[:, None, None, None], torch.arange(channels)[:, None, None], rows, columns]
