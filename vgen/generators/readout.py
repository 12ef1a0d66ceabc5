"""How the logits of targets come from hidden states: the mean over reads commutes with the matrices of the heads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vgen.schedules.plan import Read


@dataclass(frozen=True)
class Readout:
    """One matrix product whose result are the logits of all targets.

    Attributes:
        features: [B, D, K], K the width of the network times the number of heads that are read.
        weight: [V, K].
        bias: [V]; None = none.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None


def weighted(normal: Tensor, read: Read, head: int, num_targets: int) -> Tensor:
    """Sums over the reads of a head, weighted.

    Args:
        normal: [B, n, dim], one vector per read of the head.
        read: where it was read.
        head: number of the head.
        num_targets: number of targets D.

    Returns:
        [B, D, dim] in the dtype of ``normal``, zeros where the head is not read.
    """
    scaled = (normal * read.weights[head][:, None]).type_as(normal)
    empty = normal.new_zeros(len(normal), num_targets, normal.shape[-1])
    return empty.index_add(1, read.targets[head], scaled)


def shares(read: Read, head: int, num_targets: int) -> Tensor:
    """Weight of a head in the mean of every target, float32 [D]; over all heads they sum to 1."""
    weights = read.weights[head]
    return weights.new_zeros(num_targets).index_add(0, read.targets[head], weights)


def join_heads(means: Sequence[Tensor], outputs: Sequence[nn.Linear], share: Sequence[Tensor]) -> Readout:
    """One product for several heads, side by side; their biases, which targets share in parts, become columns.

    Args:
        means: per head, [B, D, dim], from :func:`weighted`.
        outputs: per head, its linear layer.
        share: per head, [D], from :func:`shares`.
    """
    features: list[Tensor] = list(means)
    weights: list[Tensor] = [output.weight for output in outputs]
    for output, part in zip(outputs, share, strict=True):
        if output.bias is not None:
            features.append(part[:, None].type_as(means[0]).expand(len(means[0]), -1, -1))
            weights.append(output.bias[:, None])
    return Readout(torch.cat(features, dim=-1), torch.cat(weights, dim=1), None)
