"""Frechet distance between Gaussian fits of two feature sets, from one streaming pass that merges over processes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.processes import Processes


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a feature set.

    Attributes:
        count: number of samples n, 0 if a file of statistics does not say.
        mean: float64 [d].
        covariance: float64 [d, d], symmetric.
        factor: float64 [k, d], k <= d, with factor.T @ factor = covariance, where the samples themselves were at hand:
            a root taken from the samples carries no rounding noise where a root of a singular matrix would.
        ddof: the covariance was divided by n - ddof.
    """

    count: int
    mean: Tensor
    covariance: Tensor
    factor: Tensor | None = None
    ddof: int = 1

    @property
    def dim(self) -> int:
        """Width d of the features."""
        return len(self.mean)


class FeatureStatistics:
    """Count, mean and centred scatter of features, accumulated in float64 batch by batch.

    Batches and processes are merged by the pairwise update of Chan, Golub and LeVeque (1979), which does not cancel
    when the mean is large against the spread.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._finite: Tensor | None = None  # of the last batch, on its way from the device

    def update(self, features: Tensor) -> None:
        """Add features [B, d]; an empty batch changes nothing.

        Raises:
            UserError: if a feature is not finite.
        """
        if len(features) == 0:
            return
        values = features.to(self.mean.device, torch.float64)
        finite: Tensor | None = torch.isfinite(values).all()
        if values.device.type != "cpu":
            # The answer about the batch before is there by now; asking about this one would stop the device.
            finite, self._finite = self._finite, finite
        self._check(finite)
        mean = values.mean(0)
        total = self.count + len(values)
        shift = mean - self.mean
        # The shift of the means is one more row, so that the whole update is one product, in place.
        between = shift * (self.count * len(values) / total) ** 0.5
        rows = torch.cat([values - mean, between[None]])
        self.scatter.addmm_(rows.T, rows)
        self.mean += shift * (len(values) / total)
        self.count = total

    @staticmethod
    def _check(finite: Tensor | None) -> None:
        if finite is not None and not bool(finite):
            raise UserError("the extractor returned NaN or infinite features; check the file of evaluation.features")

    def merge(self, other: "FeatureStatistics") -> None:
        """Add another state over features of the same kind, as if its batches had been added here.

        Raises:
            UserError: if its features have another width.
        """
        if other.mean.shape != self.mean.shape:
            raise UserError(f"statistics of {len(other.mean)} and {len(self.mean)} features cannot be merged")
        if not other.count:
            return
        total = self.count + other.count
        shift = other.mean.to(self.mean.device) - self.mean
        self.scatter += other.scatter.to(self.scatter.device)
        self.scatter.addr_(shift, shift, alpha=self.count * other.count / total)
        self.mean += shift * (other.count / total)
        self.count = total

    def reduce(self, processes: Processes) -> None:
        """Replace the state by that of all processes together; every process must call this, even an empty one."""
        self._check(self._finite)
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
        self._check(self._finite)
        divisor = self.count - ddof
        covariance = (self.scatter + self.scatter.T).cpu() / (2 * divisor)
        mean = self.mean.cpu()
        factor = None
        if rows is not None and self.count <= len(mean):
            assert rows.shape == (self.count, len(mean)), (rows.shape, self.count)
            factor = (rows.cpu().double() - mean) / divisor**0.5
        return Gaussian(self.count, mean, covariance, factor, ddof)


def gaussian_of(features: Tensor, *, ddof: int = 1) -> Gaussian:
    """Fit the Gaussian of features [n, d] held in memory, with its factor."""
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    fit = statistics.gaussian(features, ddof=ddof)
    if fit.factor is not None:
        return fit
    centred = features.cpu().double() - fit.mean
    return replace(fit, factor=torch.linalg.qr(centred, mode="r").R / (fit.count - ddof) ** 0.5)


def _root(covariance: Tensor) -> Tensor:
    """A matrix [rank, d] whose transpose times itself is the covariance.

    Cholesky's factor with pivoting, which stops at the numerical rank: what is left out is rounding noise, whose root
    would be a million times larger.
    """
    from scipy.linalg.lapack import dpstrf

    upper, pivots, rank, _ = dpstrf(covariance.numpy())
    root = torch.zeros(rank, len(covariance), dtype=torch.float64)
    root[:, torch.from_numpy(pivots.astype("int64") - 1)] = torch.from_numpy(upper[:rank]).triu()
    return root


def _varying(gaussian: Gaussian) -> Tensor:
    """Which features vary by more than the rounding of their mean."""
    noise = 8 * torch.finfo(torch.float64).eps * gaussian.mean.abs()
    return gaussian.covariance.diagonal() > noise.square()


def _cross_trace(a: Gaussian, b: Gaussian) -> Tensor:
    """The trace of (S_a S_b)^(1/2)."""
    # A feature that is constant in one set has no part in this trace, and would only make the root singular.
    kept = _varying(a) & _varying(b)
    if not bool(kept.any()):
        return torch.zeros((), dtype=torch.float64)

    def part(gaussian: Gaussian) -> Tensor:
        return gaussian.covariance[kept][:, kept]

    roots = [_root(part(g)) if g.factor is None else g.factor[:, kept] for g in (a, b)]
    if a.factor is None and b.factor is None and all(len(root) == root.shape[1] for root in roots):
        product = roots[0] @ part(b) @ roots[0].T
        return torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return torch.linalg.svdvals(roots[0] @ roots[1].T).sum()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians.

    |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2). With R^T R = S for each set the last trace is the sum of
    the roots of the eigenvalues of R_a S_b R_a^T where both covariances have full rank, and the nuclear norm of
    R_a R_b^T (the same number, without a root of rounding noise) where one is singular or the samples are at hand.
    Real, non-negative and deterministic in both forms.

    Raises:
        UserError: if the features have different widths or a fit is not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"statistics of {a.dim} and {b.dim} features cannot be compared; both sets need one extractor and layer"
        )
    for fit in (a, b):
        if not bool(torch.isfinite(fit.mean).all() and torch.isfinite(fit.covariance).all()):
            raise UserError("statistics hold NaN or infinite values; compute them again")
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * _cross_trace(a, b)
    return max(float(distance), 0.0)
