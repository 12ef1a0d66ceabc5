"""Are samples copies of training pictures? Distances to the nearest one, with real held-out pictures as the scale."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vgen.evaluation.shifts import moved_copies
from vgen.pixels import save_grid

CHUNK = 512  # pictures whose distances to the whole training set are held at once


@dataclass(frozen=True)
class NearestNeighbours:
    """Result of the copy check.

    Attributes:
        metrics: name to value, see :func:`nearest_neighbours`.
        order: int64 [n], samples from the closest to the farthest.
        neighbours: int64 [n], index of the nearest training picture of every sample.
    """

    metrics: dict[str, float]
    order: Tensor
    neighbours: Tensor


def _nearest(pictures: Tensor, training: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Root mean squared distance (0..255) to the nearest training picture, however moved, and its index."""
    wide = training.flatten(1).float()
    distance = torch.full((len(pictures),), torch.inf, dtype=torch.float64)
    index = torch.zeros(len(pictures), dtype=torch.int64)
    for moved in moved_copies(pictures, shift):
        moved = moved.flatten(1)
        found = torch.cat([torch.cdist(part.float(), wide).argmin(1) for part in moved.split(CHUNK)])
        # cdist rounds; the exact distance to the picture it chose tells a copy (0) from a near copy
        exact = (moved.double() - training[found].flatten(1).double()).square().mean(1).sqrt()
        closer = exact < distance
        distance[closer], index[closer] = exact[closer], found[closer]
    return distance, index


def nearest_neighbours(samples: Tensor, training: Tensor, held_out: Tensor, *, shift: int) -> NearestNeighbours:
    """Compare the samples' distances to the training set with those of real pictures it does not hold.

    Args:
        samples: uint8 [n, 3, H, W].
        training: uint8 [m, 3, H, W], what the generator was trained on.
        held_out: uint8 [k, 3, H, W], other real pictures.
        shift: samples and held-out pictures are also moved by up to this many pixels, as augmentation moves copies.

    Returns:
        Metrics: ``nearest_distance`` and ``nearest_distance_real``, median root mean squared difference (0..255) to
        the nearest training picture; ``nearest_ratio``, the first over the second (copies: near 0, new pictures:
        near 1); ``nearest_close``, share of samples closer than all but 1 % of the held-out pictures (0.01 for real
        ones); ``nearest_exact``, share that equal a training picture exactly.
    """
    distance, neighbours = _nearest(samples, training, shift)
    real, _ = _nearest(held_out, training, shift)
    median, median_real = distance.median(), real.median()
    metrics = {
        "nearest_ratio": float(median / median_real.clamp(min=1e-9)),
        "nearest_distance": float(median),
        "nearest_distance_real": float(median_real),
        "nearest_close": float((distance < real.quantile(0.01)).double().mean()),
        "nearest_exact": float((distance == 0).double().mean()),
    }
    return NearestNeighbours(metrics, distance.argsort(), neighbours)


def save_nearest(result: NearestNeighbours, samples: Tensor, training: Tensor, path: Path, *, count: int = 40) -> Path:
    """Write the ``count`` samples closest to the training set, each beside its nearest training picture, as a PNG."""
    chosen = result.order[:count]
    pairs = torch.stack([samples[chosen], training[result.neighbours[chosen]]], 1).flatten(0, 1)
    return save_grid(pairs, path, columns=10, scale=max(1, 64 // pairs.shape[-1]))
