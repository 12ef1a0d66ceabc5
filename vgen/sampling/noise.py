"""Where the random numbers of decoding come from."""

from typing import Protocol

import torch
from torch import Tensor

from vgen.layers.availability import why_not
from vgen.random import keyed_normal, keyed_uniform
from vgen.sampling.filters import pick_tokens

_DRAW_STREAM, _NORMAL_STREAM = 0, 5


class Noise(Protocol):
    """A source of random numbers for one batch; index tensors count in order indices, N stands for nothing."""

    def pick(self, logits: Tensor, targets: Tensor, trial: int) -> Tensor:
        """Draw tokens.

        Args:
            logits: float [B, D, V], filtered and divided by every temperature.
            targets: int64 [B, D].
            trial: how often these tokens have been drawn before.

        Returns:
            int64 [B, D].
        """

    def uniform(self, index: Tensor, trial: Tensor, stream: int) -> Tensor:
        """Uniform numbers [B, n] in [0, 1) for order indices int64 [B, n], trial int64 [B, 1] and a stream >= 1."""

    def normal(self, index: Tensor, channels: int, step: int) -> Tensor:
        """Standard normal numbers float32 [B, n, channels] for order indices int64 [B, n] and a step of a diffusion."""


class KeyedNoise:
    """Numbers keyed by (seed, sample, raster position), and by trial and stream where a position needs several.

    Args:
        seed: of the samples, a number or an int64 scalar.
        sample_index: int64 [B].
        order: int64 [N] or [B, N], raster position of every order index.

    Attributes:
        first: float64 [B, N + 1], numbers of the first draw by order index.
    """

    def __init__(self, seed: int | Tensor, sample_index: Tensor, order: Tensor) -> None:
        self._seed, self._sample, self._order = seed, sample_index[:, None], order
        if isinstance(seed, Tensor) and why_not(order.device) is None:
            self.first = _by_kernel(seed, sample_index, order)
            return
        first = keyed_uniform(seed, self._sample, order)
        # The last column is for lanes of run-time passes that decide nothing.
        self.first = torch.cat([first, torch.zeros_like(first[:, :1])], dim=1)

    def pick(self, logits: Tensor, targets: Tensor, trial: int) -> Tensor:
        """Draw tokens; arguments as in :class:`Noise`."""
        if trial == 0:
            return pick_tokens(logits, self.first.gather(1, targets))
        return pick_tokens(logits, self.uniform(targets, torch.full_like(self._sample, trial), _DRAW_STREAM))

    def uniform(self, index: Tensor, trial: Tensor, stream: int) -> Tensor:
        """Uniform numbers; arguments as in :class:`Noise`."""
        return keyed_uniform(self._seed, self._sample, self._places(index), trial, stream)

    def normal(self, index: Tensor, channels: int, step: int) -> Tensor:
        """Normal numbers; arguments as in :class:`Noise`."""
        channel = torch.arange(channels, device=index.device)
        return keyed_normal(
            self._seed, self._sample[:, :, None], self._places(index)[:, :, None], step, _NORMAL_STREAM, channel
        )

    def _places(self, index: Tensor) -> Tensor:
        """Raster positions of order indices int64 [B, n]."""
        return self._order[index] if self._order.dim() == 1 else self._order.gather(1, index)


def _by_kernel(seed: Tensor, sample_index: Tensor, order: Tensor) -> Tensor:
    """Numbers of the first draw in one kernel: 130 of PyTorch took as long as half a pass."""
    from vgen.sampling.noise_kernels import number_places

    count, columns = order.shape[-1], 128
    out = torch.empty(len(sample_index), count + 1, dtype=torch.float64, device=order.device)
    order = order.contiguous()
    # Triton launches on the current device.
    with torch.cuda.device_of(out):
        number_places[(len(out), -(-(count + 1) // columns))](
            seed, sample_index.contiguous(), order, out, count, 0 if order.dim() == 1 else count, COLUMNS=columns
        )
    return out
