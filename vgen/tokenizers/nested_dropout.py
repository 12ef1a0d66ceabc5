"""Lengths of nested dropout (Rippel et al., 2014): how many leading tokens of a picture are kept in training."""

from collections.abc import Callable

import torch
from torch import Tensor


def _uniform(u: Tensor, most: int) -> Tensor:
    return (u * most).long().clamp(max=most - 1) + 1


def _powers(most: int) -> Tensor:
    """1, 2, 4 ... below `most`, then `most` itself."""
    return torch.tensor([2**i for i in range((most - 1).bit_length())] + [most])


def _pow2(u: Tensor, most: int) -> Tensor:
    powers = _powers(most).to(u.device)
    return powers[_uniform(u, len(powers)) - 1]


def _uniform_pow2(u: Tensor, most: int) -> Tensor:
    powers = _powers(most).to(u.device)
    return powers[torch.searchsorted(powers, _uniform(u, most))]


LENGTHS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "uniform": _uniform,
    "pow2": _pow2,
    "uniform_pow2": _uniform_pow2,
}


def kept_lengths(u: Tensor, num_tokens: int, mode: str) -> Tensor:
    """Numbers of kept tokens.

    Args:
        u: uniform random numbers in [0, 1), any shape.
        num_tokens: tokens K per picture.
        mode: ``uniform`` (1..K); ``pow2`` (1, 2, 4 ... K equally likely); ``uniform_pow2`` (uniform, rounded up to the
            next of these, so that half of the pictures keep all).

    Returns:
        int64, shape of u.
    """
    return LENGTHS[mode](u, num_tokens)
