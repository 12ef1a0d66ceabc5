"""From logits to tokens: temperature, top-k, top-p and keyed sampling."""

import torch
from torch import Tensor


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Apply temperature, then top-k, then top-p (the order of LlamaGen section 6).

    Args:
        logits: float [..., V].
        temperature: divisor, bounded below by 1e-5.
        top_k: keep logits not smaller than the k-th largest, so ties at the k-th value survive; 0 = off.
        top_p: keep the smallest set of tokens whose probability exceeds p, the best token always; 1 = off. The
            probabilities are those after top-k.

    Returns:
        Logits with dropped entries at -inf.
    """
    logits = logits / max(temperature, 1e-5)
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)
        before[..., 0] = 0.0
        drop = (before > top_p).scatter(-1, index, before > top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


def pick_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution.

    One uniform number per token makes a draw cheap, independent of batch composition and monotone: a small change of
    the logits changes the token only near a boundary.

    Args:
        logits: float [..., V], filtered.
        uniform: float64 [...] in [0, 1).

    Returns:
        int64 [...]; a token of zero probability is never drawn.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    threshold = (uniform * cumulative[..., -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
