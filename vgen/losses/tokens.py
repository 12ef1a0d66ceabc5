"""Cross entropy and accuracy of token predictions."""

import torch
from torch import Tensor
from torch.nn import functional as F


def token_cross_entropy(
    logits: Tensor, ids: Tensor, valid: Tensor | None = None, *, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross entropy over tokens.

    Args:
        logits: float [B, N, V].
        ids: int64 [B, N].
        valid: [B], 1 for samples that count; the divisor is the number of valid tokens, at least 1 (LlamaGen).
        label_smoothing: probability spread evenly over all V tokens, in [0, 1).

    Returns:
        Scalar in nats per token.
    """
    if valid is None:
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), label_smoothing=label_smoothing)
    per_token = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none", label_smoothing=label_smoothing)
    weight = valid.to(per_token.dtype)[:, None].expand_as(per_token)
    return (per_token * weight).sum() / weight.sum().clamp(min=1)


def masked_cross_entropy(
    logits: Tensor, ids: Tensor, hidden: Tensor, *, visible_weight: float, label_smoothing: float
) -> Tensor:
    """Mean cross entropy over tokens of which the visible ones count less (TiTok's generators, maskgit.md section 4).

    Args:
        logits: float [B, N, V].
        ids: int64 [B, N].
        hidden: bool [B, N], tokens the network did not see.
        visible_weight: weight of the others, in [0, 1].
        label_smoothing: probability spread evenly over all V tokens, in [0, 1).

    Returns:
        Scalar in nats per token, the weighted mean over the whole batch.
    """
    per_token = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none", label_smoothing=label_smoothing)
    weight = torch.where(hidden, 1.0, visible_weight).to(per_token.dtype)
    return (per_token * weight).sum() / (weight.sum() + 1e-8)


@torch.no_grad()
def token_accuracy(logits: Tensor, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Share of tokens [B, N] that are the argmax of their logits [B, N, V].

    With ``hidden``, bool [B, N], the share of the hidden ones per sample, averaged over samples.
    """
    right = (logits.argmax(-1) == ids).float()
    if hidden is None:
        return right.mean()
    return ((right * hidden).sum(1) / hidden.sum(1).clamp(min=1)).mean()
