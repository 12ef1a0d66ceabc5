"""Images kept as encoded files (JPEG, PNG, ...): decoded when drawn, or once into memory."""

import hashlib
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor

from vgen.data.arrays import ArrayImages
from vgen.data.broken import BrokenImageError, decode_image
from vgen.data.source import (
    Batch,
    DataSource,
    Draws,
    ImageDataset,
    check_labels,
    resolve_classes,
    stratified_split,
)
from vgen.data.transforms import ImageTransform, to_tensor
from vgen.errors import UserError
from vgen.pixels import from_uint8
from vgen.random import keyed_uniform
from vgen.runtime import track

if TYPE_CHECKING:
    from PIL.Image import Image


class Reader(Protocol):
    """Numbered encoded images."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | None:
        """The bytes of one image file (None when there are none); raises OSError when it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """The name of one image in messages."""
        ...

    def fingerprint(self) -> str:
        """Changes when images are added, removed or reordered."""
        ...


@dataclass(frozen=True)
class FileReader:
    """Image files in folders.

    Attributes:
        root: common folder.
        files: paths below it.
    """

    root: Path
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        """The bytes of one file."""
        return (self.root / self.files[index]).read_bytes()

    def name(self, index: int) -> str:
        """The path of one file."""
        return str(self.root / self.files[index])

    def fingerprint(self) -> str:
        """Hash of the relative paths (not of the contents, which would mean reading everything)."""
        return hashlib.sha256("\n".join(self.files).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """Images decoded when drawn; fulfils :class:`vgen.data.source.ImageDataset`.

    A broken image is replaced by the next readable one of the set, so that batches keep their shape.

    Attributes:
        reader: where the bytes come from.
        indices: int64 [n], the images of the reader that belong to the set.
        labels: int64 [n].
        transform: crop and flip.
        image_size: side of the square pictures in pixels.
        augment: whether draws are augmented.
        seed: of the augmentation.
    """

    reader: Reader
    indices: Tensor
    labels: Tensor
    transform: ImageTransform
    image_size: int
    augment: bool
    seed: int = 0
    broken: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.indices) == len(self.labels)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Batch:
        image, used, _ = self._readable(index)
        pixels = from_uint8(self._crop(image, used, None))
        return {"pixels": pixels, "label": self.labels[used], "index": torch.tensor(used)}

    def __getitems__(self, draws: Draws) -> Batch:
        states = self._states(draws) if self.augment else [None] * len(draws)
        pictures, used, broken = [], [], []
        for (wanted, _), state in zip(draws, states, strict=True):
            image, readable, skipped = self._readable(wanted)
            pictures.append(self._crop(image, readable, None if state is None else random.Random(state)))
            used.append(readable)
            broken += skipped
        index = torch.tensor(used, dtype=torch.int64)
        pixels = from_uint8(torch.stack(pictures))
        return {"pixels": pixels, "label": self.labels[index], "index": index, "broken": broken}

    def _states(self, draws: Draws) -> list[int]:
        """One seed for Python's generator per draw, a function of (seed, draw) alone."""
        draw = torch.tensor([draw for _, draw in draws], dtype=torch.int64)
        return (keyed_uniform(self.seed, draw) * 2.0**48).long().tolist()

    def _readable(self, index: int) -> tuple["Image", int, list[str]]:
        """The image at ``index`` or the next readable one, its index, and the names of those skipped."""
        skipped: list[str] = []
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            try:
                return self.raw(candidate), candidate, skipped
            except BrokenImageError as error:
                skipped.append(str(error))
        raise UserError(f"none of the {len(self)} images can be read (first: {skipped[0]}); check data.path")

    def _crop(self, image: "Image", index: int, rng: random.Random | None) -> Tensor:
        """Crop an image to uint8 [3, S, S]."""
        picture = to_tensor(self.transform(image, rng))
        check_size(picture, self.image_size, self.name(index))
        return picture

    def raw(self, index: int) -> "Image":
        """The RGB image before any crop; raises :class:`vgen.data.broken.BrokenImageError`."""
        name = self.name(index)
        try:
            data = self.reader.read(int(self.indices[index]))
        except OSError as error:
            raise BrokenImageError(f"{name} ({error.strerror or error})") from error
        return decode_image(data, name)

    def picture(self, index: int) -> Tensor:
        """The picture in its fixed crop as uint8 [3, S, S]; raises like :meth:`raw`."""
        return self._crop(self.raw(index), index, None)

    def name(self, index: int) -> str:
        """The name of a picture in messages."""
        return self.reader.name(int(self.indices[index]))

    def subset(self, indices: Tensor) -> Self:
        """The pictures at ``indices`` (int64 [m])."""
        return replace(self, indices=self.indices[indices], labels=self.labels[indices])

    def without_augmentation(self) -> Self:
        """The same pictures, always centrally cropped, never flipped."""
        return replace(self, augment=False)

    def fingerprint(self) -> str:
        """Hash of names, labels and crop."""
        digest = hashlib.sha256(f"{self.reader.fingerprint()} {self.transform} {self.image_size}".encode())
        digest.update(self.indices.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()


def check_size(picture: Tensor, size: int, name: str) -> None:
    """Check that a picture [3, H, W] is square with side ``size``.

    Raises:
        UserError: naming the image.
    """
    height, width = picture.shape[1:]
    if (height, width) != (size, size):
        raise UserError(
            f"{name} is {width}x{height} pixels but {size}x{size} is expected; set data.image_size={size} and "
            "data.crop=adm_center to bring all images to one size"
        )


def native_size(raw: Callable[[int], "Image"], count: int, where: str | Path) -> int:
    """Side of the first readable image.

    Raises:
        UserError: if no image is readable or the first one is not square.
    """
    for index in range(count):
        try:
            image = raw(index)
        except BrokenImageError:
            continue
        if image.width != image.height:
            raise UserError(
                f"{where}: images of {image.width}x{image.height} pixels are not square; set data.image_size and "
                "data.crop=adm_center"
            )
        return image.width
    raise UserError(f"{where}: none of the {count} images can be read; check the files")


SMALL = 64
"""Side in pixels up to which one thread decodes fastest (32x32, two cores: 5,400 images/s, many threads 2,500)."""


def decode_all(images: EncodedImages, *, description: str) -> ArrayImages:
    """Decode a whole set into memory with threads, leaving broken images out.

    Args:
        images: the set; its crop must be fixed, since each picture is decoded once.
        description: of the progress bar.

    Raises:
        UserError: if the crop is random, sizes disagree or no image is readable.
    """
    if images.transform.is_random_crop and images.augment:
        raise UserError(
            f"data.crop={images.transform.crop} draws a new window each time; use data.in_memory=false, "
            "or data.crop=adm_center"
        )
    pictures = torch.empty(len(images), 3, images.image_size, images.image_size, dtype=torch.uint8)
    broken: list[str] = []
    kept: list[int] = []

    def decode(index: int) -> str | None:
        try:
            pictures[index] = images.picture(index)
        except BrokenImageError as error:
            return str(error)
        return None

    # Small pictures cost Python's time, for which threads only fight: one is twice as fast as many.
    with ThreadPoolExecutor(max_workers=1 if images.image_size <= SMALL else None) as pool:
        todo = iter(range(len(images)))
        # Submitted in blocks, so that an error stops the work instead of waiting for every image.
        results = (result for block in iter(lambda: list(islice(todo, 1024)), []) for result in pool.map(decode, block))
        for index, reason in enumerate(track(results, description, total=len(images), unit="img")):
            if reason is None:
                kept.append(index)
            else:
                broken.append(reason)
    if not kept:
        raise UserError(f"none of the {len(images)} images can be read (first: {broken[0]}); check data.path")
    keep = torch.tensor(kept)
    return ArrayImages(
        pictures=pictures[keep] if broken else pictures,
        labels=images.labels[keep],
        flip=images.transform.flip and images.augment,
        seed=images.seed,
        names=tuple(images.name(i) for i in kept),
        broken=tuple(broken),
    )


IN_MEMORY_LIMIT = 4 * 2**30
"""Bytes of decoded pictures up to which ``in_memory: null`` decodes once."""


def encoded_source(
    *,
    name: str,
    where: Path,
    train: tuple[Reader, Tensor],
    val: tuple[Reader, Tensor] | None,
    num_classes: int | None,
    class_names: Iterable[str] | None,
    image_size: int | None,
    crop: str | None,
    flip: bool,
    val_fraction: float,
    in_memory: bool | None,
    seed: int,
) -> DataSource:
    """Make a data source of encoded images; the part that parquet files and folders share.

    Args:
        name: of the data.
        where: folder named in messages.
        train: images and their labels (int64 [n]).
        val: likewise, or None to set ``val_fraction`` of the training images aside.
        num_classes: or None to take it from the names or labels.
        class_names: or None.
        image_size: side in pixels, or None for the native size, in which all images must agree.
        crop: see :class:`vgen.data.transforms.ImageTransform`; None means ``none`` at native size, else ``adm_center``.
        flip: mirror training images with probability 1/2.
        val_fraction: used where there is no validation split.
        in_memory: decode once into memory, or on each draw; None decides by size.
        seed: of the split and of the augmentation.

    Raises:
        UserError: for labels out of range, sizes that disagree, and contradictory options.
    """
    found = 1 + max(int(labels.max()) for _, labels in filter(None, (train, val)))
    count, names = resolve_classes(num_classes, class_names, found, where=where)
    for _, labels in filter(None, (train, val)):
        check_labels(labels, count, where=where)
    if crop is None:
        crop = "none" if image_size is None else "adm_center"
    transform = ImageTransform(image_size=image_size, crop=crop, flip=flip)
    images = EncodedImages(
        reader=train[0],
        indices=torch.arange(len(train[1])),
        labels=train[1],
        transform=transform,
        image_size=image_size or 0,
        augment=True,
        seed=seed,
    )
    images = replace(images, image_size=image_size or native_size(images.raw, len(images), where))
    if val is None:
        kept, held_out = stratified_split(images.labels, val_fraction, seed)
        images, held = images.subset(kept), images.subset(held_out)
    else:
        held = replace(images, reader=val[0], indices=torch.arange(len(val[1])), labels=val[1])
    held = held.without_augmentation()
    if in_memory is None:
        size = (len(images) + len(held)) * 3 * images.image_size**2
        in_memory = size <= IN_MEMORY_LIMIT and not transform.is_random_crop
    sets: list[ImageDataset] = [images, held]
    if in_memory:
        sets = [decode_all(part, description=f"decoding {name}") for part in (images, held)]
    return DataSource(name, sets[0], sets[1], count, names, images.image_size)
