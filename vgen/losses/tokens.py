"""Cross entropy and accuracy of token predictions."""

import torch
from torch import Tensor
from torch.nn import functional as F


def token_cross_entropy(logits: Tensor, ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean cross entropy over tokens.

    Args:
        logits: float [B, N, V].
        ids: int64 [B, N].
        valid: [B], 1 for samples that count; the divisor is the number of valid tokens, at least 1 (LlamaGen).

    Returns:
        Scalar in nats per token.
    """
    if valid is None:
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    per_token = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    weight = valid.to(per_token.dtype)[:, None].expand_as(per_token)
    return (per_token * weight).sum() / weight.sum().clamp(min=1)


@torch.no_grad()
def token_accuracy(logits: Tensor, ids: Tensor) -> Tensor:
    """Share of tokens [B, N] that are the argmax of their logits [B, N, V]."""
    return (logits.argmax(-1) == ids).float().mean()
