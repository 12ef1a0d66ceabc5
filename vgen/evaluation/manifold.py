"""Precision, recall, density and coverage from k-nearest-neighbour balls, block by block.

torch-fidelity has precision and recall; this file adds density and coverage (Naeem et al. 2020), and the distances of
the ADM suite, which decide differently at equality and in 16 bits.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

BLOCK = 2048
Distance = Callable[[Tensor, Tensor], Tensor]


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a|^2 - 2 a.b + |b|^2, clipped at 0, of [n, d] and [m, d]: the ADM suite's distances."""
    norms = [rows.square().sum(1) for rows in (a, b)]
    return (norms[0][:, None] - 2 * (a @ b.T) + norms[1][None]).clamp(min=0)


def half_squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """:func:`squared_distances` in float16, in float32 where that overflows: what the ADM suite really computes."""
    half = squared_distances(a.half(), b.half())
    return half.float() if bool(torch.isfinite(half).all()) else squared_distances(a, b)


def exact_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances in float64 of [n, d] and [m, d]."""
    return torch.cdist(a.double(), b.double())


def _blocks(rows: Tensor, block: int) -> Iterator[Tensor]:
    yield from rows.split(block)


def radii(features: Tensor, *, k: int, distance: Distance = exact_distances, block: int = BLOCK) -> Tensor:
    """Distance of every row of [n, d] to its k-th nearest other row, [n]; n > k."""
    found = []
    for rows in _blocks(features, block):
        nearest: list[Tensor] = []
        for others in _blocks(features, block):
            gaps = distance(rows, others)
            nearest.append(gaps.topk(min(k + 1, gaps.shape[1]), largest=False).values)
        found.append(torch.cat(nearest, 1).kthvalue(k + 1).values)  # the row itself is among the nearest
    return torch.cat(found)


def _inside(
    points: Tensor, centres: Tensor, radius: Tensor, *, distance: Distance, strict: bool, block: int
) -> tuple[Tensor, Tensor]:
    """In how many balls every point lies [n], and how many points every ball holds [m]."""
    per_point = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    per_ball = torch.zeros(len(centres), dtype=torch.int64, device=points.device)
    for i, rows in enumerate(_blocks(points, block)):
        for j, (others, reach) in enumerate(zip(centres.split(block), radius.split(block), strict=True)):
            gap = distance(rows, others)
            hit = gap < reach if strict else gap <= reach
            per_point[i * block : i * block + len(rows)] += hit.sum(1)
            per_ball[j * block : j * block + len(others)] += hit.sum(0)
    return per_point, per_ball


def precision_recall_density_coverage(
    samples: Tensor, reference: Tensor, *, k: int, block: int = BLOCK
) -> dict[str, float]:
    """The four numbers of Naeem et al. (2020, arXiv 2002.09797), which count a point only strictly inside a ball.

    Args:
        samples: generated features [n, d].
        reference: real features [m, d].
        k: nearest neighbours, usually 5.
        block: rows per block of distances; memory is block^2 floats.

    Returns:
        ``precision``, ``recall``, ``density``, ``coverage``.
    """
    inside = partial(_inside, distance=exact_distances, strict=True, block=block)
    per_sample, per_real_ball = inside(samples, reference, radii(reference, k=k, block=block))
    per_real, _ = inside(reference, samples, radii(samples, k=k, block=block))
    return {
        "precision": float((per_sample > 0).double().mean()),
        "recall": float((per_real > 0).double().mean()),
        "density": float(per_sample.double().mean()) / k,
        "coverage": float((per_real_ball > 0).double().mean()),
    }


def ball_precision_recall(
    samples: Tensor, reference: Tensor, *, k: int, distance: Distance = squared_distances, block: int = BLOCK
) -> tuple[float, float]:
    """Improved precision and recall with a given distance; a point on the surface of a ball is inside.

    Args:
        samples: generated features [n, d].
        reference: real features [m, d].
        k: nearest neighbours, 3 in the literature.
        distance: of two blocks of rows, see :func:`squared_distances`.
        block: rows per block.
    """
    inside = partial(_inside, distance=distance, strict=False, block=block)
    per_sample, _ = inside(samples, reference, radii(reference, k=k, distance=distance, block=block))
    per_real, _ = inside(reference, samples, radii(samples, k=k, distance=distance, block=block))
    return float((per_sample > 0).double().mean()), float((per_real > 0).double().mean())
