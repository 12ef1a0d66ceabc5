"""Frechet distance between Gaussian fits of two feature sets, from one streaming pass that merges over processes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.processes import Processes


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a feature set.

    Attributes:
        count: number of samples n.
        mean: float64 [d].
        covariance: float64 [d, d], symmetric.
        factor: float64 [n, d] with factor.T @ factor = covariance, kept only when n <= d: the covariance is then
            singular, and a root taken from the samples carries no rounding noise where a root of the matrix would.
    """

    count: int
    mean: Tensor
    covariance: Tensor
    factor: Tensor | None = None


class FeatureStatistics:
    """Count, mean and centred scatter of features, accumulated in float64 batch by batch.

    Batches and processes are merged by the pairwise update of Chan, Golub and LeVeque (1979), which does not cancel
    when the mean is large against the spread.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add features [B, d]; an empty batch changes nothing.

        Raises:
            UserError: if a feature is not finite.
        """
        if len(features) == 0:
            return
        values = features.to(self.mean.device, torch.float64)
        if not bool(torch.isfinite(values).all()):
            raise UserError("the extractor returned NaN or infinite features; check the file of evaluation.features")
        mean = values.mean(0)
        centred = values - mean
        total = self.count + len(values)
        shift = mean - self.mean
        self.scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(values) / total)
        self.mean += shift * (len(values) / total)
        self.count = total

    def reduce(self, processes: Processes) -> None:
        """Replace the state by that of all processes together; every process must call this, even an empty one."""
        count = torch.tensor(float(self.count), dtype=torch.float64, device=self.mean.device)
        total = processes.sum(count)
        mean = processes.sum(self.mean * self.count) / total.clamp(min=1)
        shift = self.mean - mean
        self.scatter = processes.sum(self.scatter + torch.outer(shift, shift) * self.count)
        self.mean, self.count = mean, int(total)

    def gaussian(self, rows: Tensor | None = None, *, ddof: int = 1) -> Gaussian:
        """Fit the Gaussian.

        Args:
            rows: all features [n, d], used when n <= d (see :class:`Gaussian`); without them the covariance is used.
            ddof: 1 divides the scatter by n - 1 (torch-fidelity, ADM, clean-fid), 0 by n (StyleGAN-V, LARP).

        Raises:
            UserError: for fewer than two samples.
        """
        if self.count < 2:
            raise UserError(f"a Frechet distance needs at least 2 pictures in each set; one set has {self.count}")
        divisor = self.count - ddof
        covariance = (self.scatter + self.scatter.T).cpu() / (2 * divisor)
        mean = self.mean.cpu()
        factor = None
        if rows is not None and self.count <= len(mean):
            assert rows.shape == (self.count, len(mean)), (rows.shape, self.count)
            factor = (rows.cpu().double() - mean) / divisor**0.5
        return Gaussian(self.count, mean, covariance, factor)


def gaussian_of(features: Tensor, *, ddof: int = 1) -> Gaussian:
    """Fit the Gaussian of features [n, d] held in memory."""
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics.gaussian(features, ddof=ddof)


def _root(gaussian: Gaussian) -> Tensor:
    """A matrix [k, d] whose transpose times itself is the covariance."""
    if gaussian.factor is not None:
        return gaussian.factor
    values, vectors = torch.linalg.eigh(gaussian.covariance)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians.

    |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2). With both sets larger than their dimension the last trace
    is the sum of the roots of the eigenvalues of R_a S_b R_a^T, R_a^T R_a = S_a; with a smaller set it is the nuclear
    norm of R_a R_b^T, exact for singular covariances. Real, non-negative and deterministic in both forms.
    """
    assert a.mean.shape == b.mean.shape, (a.mean.shape, b.mean.shape)
    root = _root(a)
    if a.factor is None and b.factor is None:
        product = root @ b.covariance @ root.T
        cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    else:
        cross = torch.linalg.svdvals(root @ _root(b).T).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)
