"""The ADM suite's dialect of FID, sFID, Inception score, precision and recall (Dhariwal and Nichol 2021).

Its network and resize are those of :mod:`vgen.evaluation.inception`; this file holds the conventions by which its
numbers differ from torch-fidelity's on the same features. Source: openai/guided-diffusion, ``evaluations``.
"""

import torch
from torch import Tensor

from vgen.evaluation.manifold import ball_precision_recall, half_squared_distances, squared_distances

SPLIT_SIZE = 5000
NEIGHBORHOOD = 3


def adm_inception_score(logits: Tensor, *, split_size: int = SPLIT_SIZE) -> float:
    """Mean over consecutive blocks of exp(mean KL(p(y|x) || p(y))), softmax in float32, rows in file order.

    Nothing is shuffled: of a file sorted by class a block holds few classes and the score is capped near their number.

    Args:
        logits: [n, classes] without bias, in the order of the file.
        split_size: rows of a block; the last may be shorter.
    """
    probabilities = logits.float().softmax(1)
    scores = []
    for part in probabilities.split(split_size):
        divergence = part * (part.log() - part.mean(0, keepdim=True).log())
        # 0 log 0 = 0: a probability that underflows adds nothing
        scores.append(divergence.nan_to_num(0.0).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def adm_precision_recall(
    samples: Tensor, reference: Tensor, *, k: int = NEIGHBORHOOD, half: bool = False
) -> tuple[float, float]:
    """Precision and recall from squared distances of pooled features, of samples [n, d] and reference [m, d].

    Args:
        samples: generated features.
        reference: features of the pictures in the reference batch (10,000 at 256 pixels).
        k: nearest neighbours.
        half: compute distances in float16 where they do not overflow, as the original does: its published figures carry
            that rounding (0.8265 / 0.5309 where float32 gives 0.8255 / 0.5285 on the same files).
    """
    distance = half_squared_distances if half else squared_distances
    return ball_precision_recall(samples.float(), reference.float(), k=k, distance=distance)


def class_mixed(labels: Tensor, *, split_size: int = SPLIT_SIZE) -> bool:
    """Whether every block of labels [n] holds about as many classes as the whole set, as the Inception score needs."""
    total = len(labels.unique())
    expected = min(total, split_size, len(labels))
    return all(len(part.unique()) >= expected / 2 for part in labels.split(split_size) if len(part) == split_size)
