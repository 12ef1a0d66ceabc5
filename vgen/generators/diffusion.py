"""Gaussian diffusion of small vectors with learned variances (arXiv 2006.11239, 2102.09672)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
_HALF_BIN = 1.0 / 255.0


def cosine_alphas(steps: int) -> Tensor:
    """Share of signal left after each step, float64 [steps], falling as a squared cosine (arXiv 2102.09672, eq. 17)."""
    moments = torch.arange(steps + 1, dtype=torch.float64) / steps
    raw = torch.cos((moments + 0.008) / 1.008 * math.pi / 2).square()
    return (1.0 - (1.0 - raw[1:] / raw[:-1]).clamp(max=0.999)).cumprod(0)


@dataclass(frozen=True, eq=False)
class Diffusion:
    """The chain over some of the training steps.

    Attributes:
        times: int64 [S], the training step each step of the chain stands for.
        alphas: float64 [S], share of signal left after it.
    """

    times: Tensor
    alphas: Tensor

    @staticmethod
    def over(train_steps: int, steps: int | None = None) -> "Diffusion":
        """A chain of ``steps`` steps spread evenly over the training steps; null = all of them."""
        alphas = cosine_alphas(train_steps)
        if steps is None or steps == train_steps:
            return Diffusion(torch.arange(train_steps), alphas)
        stride = (train_steps - 1) / max(1, steps - 1)
        times = torch.tensor([round(index * stride) for index in range(steps)])
        return Diffusion(times, alphas[times])

    def _tables(self) -> dict[str, Tensor]:
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas[:-1]])
        beta = 1.0 - self.alphas / before
        variance = beta * (1.0 - before) / (1.0 - self.alphas)
        # The first step has no variance; the second's stands in, where there is one.
        low = torch.cat([variance[1:2] if len(variance) > 1 else beta[:1], variance[1:]]).log()
        return {
            "signal": self.alphas.sqrt(),
            "noise": (1.0 - self.alphas).sqrt(),
            "from_start": beta * before.sqrt() / (1.0 - self.alphas),
            "from_state": (1.0 - before) * (1.0 - beta).sqrt() / (1.0 - self.alphas),
            "low": low,
            "high": beta.log(),
        }

    def loss(self, predict: Predict, start: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        """Squared error of the predicted noise plus the variational bound, which trains the variances alone.

        Args:
            predict: (noisy vectors float32 [..., C], training steps int64 [...]) -> [..., 2 C]: noise, and where the
                log-variance lies between its bounds, -1 to 1.
            start: float32 [..., C].
            index: int64 [...], steps of the chain.
            noise: float32 [..., C], standard normal.

        Returns:
            float32 [...]: the mean over C of both, the bound in bits.
        """
        tables = {name: table.float().to(start.device)[index][..., None] for name, table in self._tables().items()}
        state = tables["signal"] * start + tables["noise"] * noise
        guess, spread = predict(state, self.times.to(start.device)[index]).float().chunk(2, dim=-1)
        mean, log_variance = _posterior(tables, state, guess.detach(), spread)
        true_mean = tables["from_start"] * start + tables["from_state"] * state
        gap = log_variance - tables["low"]
        divergence = 0.5 * (gap - 1.0 + (-gap).exp() + (true_mean - mean).square() * (-log_variance).exp())
        likelihood = _bin_log_likelihood(start, mean, 0.5 * log_variance)
        bound = torch.where(index == 0, -likelihood.mean(-1), divergence.mean(-1)) / math.log(2.0)
        return (guess - noise).square().mean(-1) + bound

    def sample(
        self,
        predict: Predict,
        noises: Callable[[int], Tensor],
        temperature: float = 1.0,
        largest: float | None = None,
    ) -> Tensor:
        """Draw vectors.

        Args:
            predict: as in :meth:`loss`; all vectors are at the same step, int64 [1].
            noises: step of the chain counted from its noisy end -> float32 [..., C], standard normal; 0 is the start.
            temperature: factor of the noise of every step after the start.
            largest: bound of the vectors that a step foresees; null = none.

        Returns:
            float32 [..., C].
        """
        state = noises(0)
        tables = {name: table.float().to(state.device) for name, table in self._tables().items()}
        times = self.times.to(state.device)
        for step in reversed(range(len(times))):
            here = {name: table[step] for name, table in tables.items()}
            guess, spread = predict(state, times[step : step + 1]).float().chunk(2, dim=-1)
            state, log_variance = _posterior(here, state, guess, spread, largest)
            if step:
                state = state + temperature * (0.5 * log_variance).exp() * noises(len(times) - step)
        return state


def _posterior(
    tables: dict[str, Tensor], state: Tensor, guess: Tensor, spread: Tensor, largest: float | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the step before, given the noise and the spread that a network predicts."""
    start = (state - tables["noise"] * guess) / tables["signal"]
    if largest is not None:
        start = start.clamp(-largest, largest)
    mean = tables["from_start"] * start + tables["from_state"] * state
    share = (spread + 1.0) / 2.0
    return mean, share * tables["high"] + (1.0 - share) * tables["low"]


def _bin_log_likelihood(value: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Log-probability of the bin of width 2/255 around a value; the outermost bins of [-1, 1] are open.

    The cumulative normal distribution is approximated by a tanh, as in the public diffusion code.
    """
    inverse = (-log_deviation).exp()

    def below(edge: Tensor) -> Tensor:
        x = (edge - mean) * inverse
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))

    upper, lower = below(value + _HALF_BIN), below(value - _HALF_BIN)
    inside = (upper - lower).clamp(min=1e-12).log()
    first, last = upper.clamp(min=1e-12).log(), (1.0 - lower).clamp(min=1e-12).log()
    return torch.where(value < -0.999, first, torch.where(value > 0.999, last, inside))
