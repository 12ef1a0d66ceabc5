"""Scores of feature sets, computed by torch-fidelity's own functions."""

from torch import Tensor


def inception_score(logits: Tensor, *, splits: int, seed: int) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))) of shuffled logits [n, classes]."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    out = isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=seed)
    return out["inception_score_mean"], out["inception_score_std"]


def kernel_distance(samples: Tensor, reference: Tensor, *, subsets: int, subset_size: int, seed: int) -> tuple:
    """Mean and standard deviation over subsets of the unbiased squared MMD, kernel (x.y/d + 1)^3 (Binkowski 2018)."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    out = kid_features_to_metric(
        samples, reference, kid_subsets=subsets, kid_subset_size=subset_size, rng_seed=seed, verbose=False
    )
    return out["kernel_inception_distance_mean"], out["kernel_inception_distance_std"]


def precision_recall(samples: Tensor, reference: Tensor, *, neighborhood: int) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of generated against real features, k nearest."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    out = prc_features_to_metric(samples, reference, prc_neighborhood=neighborhood, save_cpu_ram=True, verbose=False)
    return out["precision"], out["recall"]
