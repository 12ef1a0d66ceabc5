"""The embedded data set: 1,797 scanned handwritten digits that come with scikit-learn."""

import torch

from vgen.data.arrays import ArrayImages, resize_pictures
from vgen.data.source import DataSource, stratified_split
from vgen.errors import UserError


def digits(*, image_size: int, shift: int, val_fraction: float, seed: int) -> DataSource:
    """Handwritten digits (UCI "Optical Recognition of Handwritten Digits", 8x8 scans of 16 grey levels).

    Args:
        image_size: side in pixels after antialiased bicubic resizing.
        shift: training images move by up to this many pixels (0 switches the augmentation off).
        val_fraction: share of every class set aside.
        seed: of the split and of the augmentation.

    Raises:
        UserError: if an option is out of range.
    """
    from sklearn.datasets import load_digits

    if image_size < 1:
        raise UserError(f"data.image_size={image_size} must be a positive number of pixels")
    if not 0 <= shift < image_size:
        raise UserError(f"data.shift={shift} must be between 0 and data.image_size - 1 = {image_size - 1} pixels")
    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).long()
    scans = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    train, val = stratified_split(labels, val_fraction, seed)
    images = ArrayImages(
        pictures=resize_pictures(scans, image_size),
        labels=labels,
        shift=shift,
        seed=seed,
        names=[f"digit {i}" for i in range(len(labels))],
    )
    names = tuple(str(i) for i in range(10))
    held_out = images.subset(val).without_augmentation()
    return DataSource("digits", images.subset(train), held_out, 10, names, image_size)
