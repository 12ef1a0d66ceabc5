"""Cross entropy and accuracy of token predictions."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Logits in the working dtype that exist at one time (256 MiB in bfloat16).
CHUNK_LOGITS = 2**27
MASKED_FLOOR = 1e-8
"""Added to the sum of weights of :func:`masked_cross_entropy`."""


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
    return (per_token * weight).sum() / (weight.sum() + MASKED_FLOOR)


@torch.no_grad()
def token_accuracy(logits: Tensor, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Share of tokens [B, N] that are the argmax of their logits [B, N, V].

    With ``hidden``, bool [B, N], the share of the hidden ones per sample, averaged over samples.
    """
    return mean_accuracy(logits.argmax(-1) == ids, hidden)


def mean_accuracy(right: Tensor, hidden: Tensor | None = None) -> Tensor:
    """The same of tokens that are known to be right or wrong, bool [B, N]."""
    if hidden is None:
        return right.float().mean()
    return ((right.float() * hidden).sum(1) / hidden.sum(1).clamp(min=1)).mean()


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    *,
    weights: Tensor | None = None,
    floor: float = 0.0,
    label_smoothing: float = 0.0,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of logits that are a matrix product, in chunks of rows: the logits are never held as a whole.

    The gradients are computed with the loss, so that the backward pass needs no logits. Under autocast the products run
    in its dtype, the rest in float32, as for logits made by a linear layer.

    Args:
        features: float [B, N, K].
        weight: float [V, K], logits = features weight^T + bias.
        bias: float [V], or None.
        ids: int64 [B, N].
        weights: float [B, N], weight of every token in the mean, in [0, 1]; None = 1.
        floor: added to the sum of the weights, the divisor.
        label_smoothing: probability spread evenly over all V tokens, in [0, 1).
        compiled: compile what is done to the logits of a chunk.

    Returns:
        The weighted mean in nats per token, and bool [B, N]: which tokens are the argmax of their logits.
    """
    device = features.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    rows = torch.ones(ids.numel(), device=ids.device) if weights is None else weights.flatten().float()
    total, right = _LinearCrossEntropy.apply(
        features.flatten(0, 1), weight, bias, ids.flatten(), rows, label_smoothing, dtype, compiled
    )
    return total / (rows.sum() + floor), right.view_as(ids)


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted sum over rows; the gradients are those of the sum and are scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        rows: Tensor,
        smoothing: float,
        dtype: torch.dtype,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        """Sum of the losses, and which rows [M] are right."""
        terms = _compiled_terms() if compiled else _terms
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        with torch.autocast(features.device.type, enabled=False):
            x, matrix = features.to(dtype), weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
            chunks = -(-len(x) * len(weight) // CHUNK_LOGITS)
            step = -(-len(x) // chunks)
            d_weight = d_bias = None
            d_features = torch.empty_like(x) if needed else None
            losses, right = [], []
            for start in range(0, len(x), step):
                part = slice(start, start + step)
                logits = F.linear(x[part], matrix, offset)
                loss, hit, slope = terms(logits, ids[part], rows[part], smoothing)
                losses.append(loss)
                right.append(hit)
                del logits
                if d_features is None:
                    continue
                torch.mm(slope, matrix, out=d_features[part])
                product = (slope.t() @ x[part]).to(weight.dtype)
                d_weight = product if d_weight is None else d_weight.add_(product)
                if bias is not None:
                    summed = slope.sum(0, dtype=bias.dtype)
                    d_bias = summed if d_bias is None else d_bias.add_(summed)
        if needed:
            ctx.save_for_backward(d_features, d_weight, d_bias)
        hits = torch.cat(right)
        ctx.mark_non_differentiable(hits)
        return torch.stack(losses).sum(), hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of features, weight and bias."""
        d_features, d_weight, d_bias = ctx.saved_tensors
        scaled = [None if gradient is None else gradient * scale for gradient in (d_features, d_weight, d_bias)]
        return (*scaled, None, None, None, None, None)


def _terms(logits: Tensor, ids: Tensor, rows: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of the losses of logits [M, V], which rows are right, and the gradient of the sum, like logits."""
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    top = wide.logsumexp(-1, keepdim=True)
    chosen = wide.gather(1, ids[:, None])
    loss = top - (1.0 - smoothing) * chosen
    if smoothing:
        loss = loss - smoothing * wide.mean(-1, keepdim=True)
    target = torch.arange(logits.shape[1], device=ids.device) == ids[:, None]
    slope = (wide - top).exp() - torch.where(target, 1.0 - smoothing, 0.0)
    if smoothing:
        slope = slope - smoothing / logits.shape[1]
    return (loss[:, 0] * rows).sum(), wide.argmax(-1) == ids, (slope * rows[:, None]).type_as(logits)


@cache
def _compiled_terms() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_terms, dynamic=False)
