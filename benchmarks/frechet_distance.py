"""Frechet distance from means and covariances: our root against scipy's sqrtm and torch-fidelity's eigenvalues.

    OMP_NUM_THREADS=2 OPENBLAS_NUM_THREADS=2 python -m benchmarks.frechet_distance --dim 2048 --samples 10000

Prints the time of each method (on the clock, and of the processor for a machine that is shared), its value, and how far
it is from ours. ``--deficient`` makes covariances of half the rank, whose roots are mostly rounding noise unless the
method takes care.
"""

import argparse
import time
from collections.abc import Callable

import torch

from vgen.evaluation.frechet import FeatureStatistics, Gaussian, frechet_distance


def fit(samples: int, dim: int, *, seed: int) -> Gaussian:
    """Gaussian fit of rectified, correlated features, whose spectrum decays as that of Inception's."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, dim + 1).float() ** -0.5
    mixing = torch.randn(dim, dim, generator=generator) * scale[:, None] / dim**0.25
    statistics = FeatureStatistics(dim)
    for start in range(0, samples, 1000):
        rows = torch.randn(min(1000, samples - start), dim, generator=generator)
        statistics.update((rows @ mixing + 0.1 * seed).relu())
    return statistics.gaussian()


def by_sqrtm(a: Gaussian, b: Gaussian) -> float:
    """The distance as ADM, clean-fid and pytorch-fid compute it."""
    import numpy as np
    from scipy.linalg import sqrtm

    root = np.asarray(sqrtm(a.covariance.numpy() @ b.covariance.numpy()))
    if not np.isfinite(root).all():
        offset = np.eye(a.dim) * 1e-6
        root = np.asarray(sqrtm((a.covariance.numpy() + offset) @ (b.covariance.numpy() + offset)))
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    return float(distance) - 2 * float(np.trace(root).real)


def by_eigenvalues(a: Gaussian, b: Gaussian) -> float:
    """The distance as torch-fidelity and torchmetrics compute it."""
    roots = torch.linalg.eigvals(a.covariance @ b.covariance).sqrt().real.sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * roots
    return float(distance)


METHODS: dict[str, Callable[[Gaussian, Gaussian], float]] = {
    "vgen": frechet_distance,
    "scipy sqrtm": by_sqrtm,
    "eigenvalues of the product": by_eigenvalues,
}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Command line; returns the values by method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--deficient", action="store_true", help="fewer samples than dimensions")
    options = parser.parse_args(arguments)
    samples = options.dim // 2 if options.deficient else options.samples
    a, b = (fit(samples, options.dim, seed=seed) for seed in (1, 2))
    print(f"{options.dim} dimensions, {samples} samples, {torch.get_num_threads()} threads")
    values: dict[str, float] = {}
    for name, method in METHODS.items():
        start, cpu = time.perf_counter(), time.process_time()
        values[name] = method(a, b)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        error = abs(values[name] - values["vgen"])
        print(
            f"{name:<28} {seconds:7.2f} s ({cpu:7.2f} s of CPU)   {values[name]:.9f}   differs by {error:.2e}",
            flush=True,
        )
    return values


if __name__ == "__main__":
    main()
