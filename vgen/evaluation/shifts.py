"""Pictures moved by a few pixels, as training augmentation moves them."""

from collections.abc import Iterator
from itertools import product

from torch import Tensor
from torch.nn import functional as F


def moved_copies(pictures: Tensor, reach: int) -> Iterator[Tensor]:
    """Pictures [n, C, H, W] moved by every (down, right) of at most ``reach`` pixels; revealed edges are black."""
    height, width = pictures.shape[2:]
    padded = F.pad(pictures, (reach,) * 4)
    for top, left in product(range(2 * reach + 1), repeat=2):
        yield padded[:, :, top : top + height, left : left + width]
