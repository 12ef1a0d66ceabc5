"""Scores of feature sets, computed by torch-fidelity's own functions, and the few it lacks.

The ADM suite's dialect of the same scores is in :mod:`vgen.evaluation.adm`.
"""

import math

import numpy as np
import torch
from torch import Tensor

from vgen.processes import Processes

MIND_PROJECTIONS = 1000  # torch-fidelity's default
PRC_ROWS = 500  # distances of so many rows to all others are held at a time: 100 MB for 50,000


def inception_score(logits: Tensor, *, splits: int, seed: int, shuffle: bool = True) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))) of logits [n, classes].

    Shuffled by default, as torch-fidelity does: of samples sorted by class, a split would hold a few classes only.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    count = len(logits)
    order = np.random.RandomState(seed).permutation(count) if shuffle else np.arange(count)
    scores = []
    for i in range(splits):  # one at a time: torch-fidelity makes four float64 copies of what it is given
        rows = torch.from_numpy(order[i * count // splits : (i + 1) * count // splits])
        part = isc_features_to_metric(logits[rows.to(logits.device)], splits=1, shuffle=False)
        scores.append(part["inception_score_mean"])
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    samples: Tensor, reference: Tensor, *, subsets: int, subset_size: int, seed: int, **kernel
) -> tuple:
    """Mean and standard deviation over subsets of the unbiased squared MMD (KID, Binkowski et al. 2018).

    Args:
        samples: [n, d].
        reference: [m, d].
        subsets: number of random subsets.
        subset_size: rows of each set in a subset.
        seed: of the draws.
        kernel: torch-fidelity's ``kid_kernel`` options; its default is the polynomial (x.y/d + 1)^3.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    out = kid_features_to_metric(
        samples, reference, kid_subsets=subsets, kid_subset_size=subset_size, rng_seed=seed, verbose=False, **kernel
    )
    return out["kernel_inception_distance_mean"], out["kernel_inception_distance_std"]


def precision_recall(samples: Tensor, reference: Tensor, *, neighborhood: int) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of generated against real features, k nearest."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    options = {"prc_neighborhood": neighborhood, "prc_batch_size": PRC_ROWS, "save_cpu_ram": True, "verbose": False}
    out = prc_features_to_metric(samples, reference, **options)
    return out["precision"], out["recall"]


def f_score(precision: float, recall: float) -> float:
    """Harmonic mean of precision and recall, as torch-fidelity guards it against 0."""
    return 2 * precision * recall / max(1e-5, precision + recall)


def squared_mmd(
    x: Tensor,
    y: Tensor,
    *,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    rbf_sigma: float | None = None,
) -> float:
    """Unbiased squared maximum mean discrepancy of two whole sets, in float64.

    Args:
        x: [n, d].
        y: [m, d].
        degree: of the polynomial kernel (gamma x.y + coef0)^degree.
        gamma: 1 / d when None.
        coef0: constant of the polynomial kernel.
        rbf_sigma: width of a Gaussian kernel exp(-|x - y|^2 / (2 sigma^2)), used instead if given.

    Returns:
        The estimate; negative values are possible for equal distributions.
    """
    x, y = x.double(), y.double()
    scale = 1 / x.shape[1] if gamma is None else gamma

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        if rbf_sigma is not None:
            return torch.exp(-torch.cdist(a, b).square() / (2 * rbf_sigma**2))
        return (scale * (a @ b.T) + coef0) ** degree

    def within(a: Tensor) -> Tensor:
        gram = kernel(a, a)
        return (gram.sum() - gram.diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def sliced_distance(samples: Tensor, reference: Tensor, *, projections: int = MIND_PROJECTIONS, seed: int) -> float:
    """MIND: mean squared difference of sorted projections, a sliced Wasserstein distance times 3 d.

    Follows torch-fidelity's unreleased 0.5; 0.4 takes its keyword without computing anything.

    Args:
        samples: [n, d].
        reference: [m, d].
        projections: random directions.
        seed: of the directions and of the rows left out of the larger set.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(len(samples), len(reference))

    def subset(rows: Tensor) -> Tensor:
        rows = rows.cpu()
        return rows if len(rows) == size else rows[torch.randperm(len(rows), generator=generator)[:size]]

    x, y = subset(samples), subset(reference)
    directions = torch.randn(projections, x.shape[1], generator=generator)
    return sliced_distance_along(x, y, directions / directions.norm(dim=1, keepdim=True))


def sliced_distance_along(x: Tensor, y: Tensor, directions: Tensor) -> float:
    """3 d times the mean squared difference of the sorted projections of x [n, d] and y [n, d] on [M, d] directions."""
    sorted_x, sorted_y = ((rows.float() @ directions.T).sort(dim=0).values for rows in (x, y))
    return 3 * x.shape[1] * float((sorted_x - sorted_y).double().square().mean())


class StreamingInceptionScore:
    """Inception score of one split from running sums, for sets whose logits are not kept (TiTok's evaluator)."""

    EPS = 1e-16

    def __init__(self, classes: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.sum = torch.zeros(classes, dtype=torch.float64, device=device)
        self.entropy = torch.zeros((), dtype=torch.float64, device=device)  # sum of p log p over rows and classes

    def update(self, logits: Tensor) -> None:
        """Add logits [B, classes]."""
        p = logits.to(self.sum.device, torch.float64).softmax(1)
        self.count += len(p)
        self.sum += p.sum(0)
        self.entropy += (p * torch.log(p + self.EPS)).sum()

    def reduce(self, processes: Processes) -> None:
        """Replace the state by that of all processes together; every process must call this."""
        count = torch.tensor(float(self.count), dtype=torch.float64, device=self.sum.device)
        self.count = int(processes.sum(count))
        self.sum, self.entropy = processes.sum(self.sum), processes.sum(self.entropy)

    def score(self) -> float:
        """Exponential of the mean KL divergence to the marginal; NaN without samples."""
        if not self.count:
            return math.nan
        marginal = self.sum / self.count
        cross = (marginal * torch.log(marginal + self.EPS)).sum()
        return math.exp(float(self.entropy / self.count - cross))


def codebook_scores(counts: Tensor, *, log_eps: float = 0.0) -> dict[str, float]:
    """Usage of a codebook over a whole set.

    Args:
        counts: int64 [K], how often every code was used.
        log_eps: added inside the logarithm of the entropy (1e-8 in TiTok's evaluator).

    Returns:
        ``codebook_usage`` (share of codes used at least once), ``codebook_entropy_bits``, ``codebook_perplexity``.
    """
    share = counts.double() / counts.sum()
    entropy = float(-(share * torch.log(share + log_eps)).nansum())
    return {
        "codebook_usage": float((counts > 0).double().mean()),
        "codebook_entropy_bits": entropy / math.log(2),
        "codebook_perplexity": math.exp(entropy),
    }
