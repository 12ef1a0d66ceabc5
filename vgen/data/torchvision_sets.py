"""CIFAR-10, MNIST and Fashion-MNIST, downloaded by torchvision."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen.data.arrays import ArrayImages, resize_pictures
from vgen.data.source import DataSource
from vgen.errors import UserError
from vgen.runtime import locked, writable_folder

_MNIST_FILES = (
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte (or .gz)"
)
_FILES = {
    "CIFAR10": "cifar-10-python.tar.gz (or its folder cifar-10-batches-py) in {root}",
    "MNIST": _MNIST_FILES + " in {root}/MNIST/raw",
    "FashionMNIST": _MNIST_FILES + " in {root}/FashionMNIST/raw",
}


def cifar10(*, root: str, download: bool, image_size: int | None, flip: bool, seed: int) -> DataSource:
    """CIFAR-10: 50,000 + 10,000 colour pictures of 32x32 pixels; see :func:`torchvision_source`."""
    return torchvision_source("CIFAR10", root=root, download=download, image_size=image_size, flip=flip, seed=seed)


def mnist(*, root: str, download: bool, image_size: int | None, flip: bool, seed: int) -> DataSource:
    """MNIST: 60,000 + 10,000 handwritten digits of 28x28 pixels; see :func:`torchvision_source`."""
    return torchvision_source("MNIST", root=root, download=download, image_size=image_size, flip=flip, seed=seed)


def fashion_mnist(*, root: str, download: bool, image_size: int | None, flip: bool, seed: int) -> DataSource:
    """Fashion-MNIST: 60,000 + 10,000 grey pictures of 28x28 pixels; see :func:`torchvision_source`."""
    return torchvision_source("FashionMNIST", root=root, download=download, image_size=image_size, flip=flip, seed=seed)


def torchvision_source(
    kind: str, *, root: str, download: bool, image_size: int | None, flip: bool, seed: int
) -> DataSource:
    """Read one of torchvision's small data sets into memory; the official test split is the validation set.

    Args:
        kind: class of ``torchvision.datasets``: CIFAR10, MNIST or FashionMNIST.
        root: folder of the files; downloads go there.
        download: fetch missing files.
        image_size: side in pixels (antialiased bicubic), None for the native size.
        flip: mirror training images with probability 1/2.
        seed: of the augmentation.

    Raises:
        UserError: if files are missing or damaged and cannot be downloaded.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"data.image_size={image_size} must be a positive number of pixels")
    folder = Path(root).expanduser()
    sets = [_load(kind, folder, train=train, download=download) for train in (True, False)]
    parts = []
    for loaded, is_train in zip(sets, (True, False), strict=True):
        pictures = _pictures(loaded)
        images = ArrayImages(
            pictures=resize_pictures(pictures, image_size or pictures.shape[-1]),
            labels=torch.as_tensor(loaded.targets).long(),
            flip=flip and is_train,
            seed=seed,
        )
        parts.append(images)
    names = tuple(loaded.classes)
    return DataSource(kind.lower(), parts[0], parts[1], len(names), names, parts[0].image_size)


def _pictures(loaded: Any) -> Tensor:
    """The uint8 pictures of a torchvision set as [n, C, H, W]."""
    data = torch.as_tensor(loaded.data)
    return data.permute(0, 3, 1, 2).contiguous() if data.ndim == 4 else data[:, None]


def _load(kind: str, folder: Path, *, train: bool, download: bool) -> Any:
    from torchvision import datasets

    make = getattr(datasets, kind)
    files = _FILES[kind].format(root=folder)
    try:
        return make(str(folder), train=train, download=False)
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        if not download:
            raise UserError(
                f"data.root={folder} does not hold a complete {kind}; put {files}, or set data.download=true"
            ) from error
    writable_folder(folder, "data.root")
    try:
        with locked(folder / f".{kind}.lock"):
            return make(str(folder), train=train, download=True)
    # Download failures reach us as URLError and timeouts (OSError), bad checksums and mirrors as RuntimeError.
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{kind} could not be downloaded to data.root={folder} ({error}); put {files} by hand"
        ) from error
