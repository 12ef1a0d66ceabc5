"""Iterative unmasking: every pass decides all open tokens, keeps the most confident and opens the others again."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vgen.schedules.course import Course, Policy, Uniform
from vgen.schedules.masking import Ratio, hidden_share
from vgen.schedules.plan import Forward, Read

Confidence = Literal["logit", "log-probability"]
CONFIDENCE = 4
# Divisor of the logits with softmax annealing: 1.3 in front of the first pass, 0.5 at the last (TiTok).
SOFTEST, SHARPEST = 1.3, 0.5


@dataclass(frozen=True)
class Unmasking(Policy):
    """Unmasking as TiTok's generators decode (arXiv 2406.07550; their public sampling code).

    With r = share of passes done after this one: tokens are drawn at the temperature T (1 - r); a token's confidence is
    its guided logit plus T (1 - r) Gumbel; all but the hidden_share(r) least confident tokens of those that were open
    at the beginning are kept. The last pass has no noise and keeps everything.

    Attributes:
        num_condition: number of condition slots C.
        num_tokens: number of tokens N.
        steps: passes of every run.
        ratio: share of tokens open after each pass.
        noise_temperature: T >= 0.
        draw_temperature: temperature of the token draws in every pass (1 in MaskGIT); None = T (1 - r).
        softmax_annealing: logits are divided by 0.5 + 0.8 (1 - r).
        confidence: ``logit``: as it comes, so that a position with larger logits wins whatever its certainty (TiTok);
            ``log-probability``: normalised (MaskGIT, arXiv 2202.04200).
    """

    num_condition: int
    num_tokens: int
    steps: int
    ratio: Ratio
    noise_temperature: float
    draw_temperature: float | None
    softmax_annealing: bool
    confidence: Confidence

    @property
    def num_passes(self) -> int:
        """Passes of every run."""
        return self.steps

    def open_after(self, index: int, start: Tensor, opened: Tensor) -> Tensor:
        """Tokens left open after a pass.

        Every pass keeps at least one token as long as more are open than passes are left.

        Args:
            index: number of the pass.
            start: float64 [B], tokens open at the beginning.
            opened: int64 [B], tokens open before the pass.
        """
        left = self.steps - 1 - index
        if left == 0:
            return torch.zeros_like(opened)
        wanted = (start * hidden_share(self.ratio, (index + 1) / self.steps)).floor().long()
        return torch.maximum(torch.minimum(opened - 1, wanted), opened.clamp(max=left))

    def open_before(self) -> list[int]:
        """Tokens open before each pass where none is given."""
        opened, counts = torch.tensor([self.num_tokens]), []
        start = opened.double()
        for index in range(self.steps):
            counts.append(int(opened))
            opened = self.open_after(index, start, opened)
        return counts

    def start(self, first: Forward, batch: int, uniform: Uniform, known: Tensor | None) -> Course:
        """Begin a batch; given tokens are known from the first pass on."""
        return UnmaskingCourse(self, first, batch, uniform, known)


class UnmaskingCourse(Course):
    """The open tokens of one batch; arguments as in :meth:`Unmasking.start`."""

    needs_logits = True

    def __init__(self, policy: Unmasking, first: Forward, batch: int, uniform: Uniform, known: Tensor | None) -> None:
        device, tokens = first.rows.device, policy.num_tokens
        self._policy, self._uniform = policy, uniform
        self._index = torch.arange(tokens, device=device).expand(batch, -1)
        self._open = torch.ones(batch, tokens, dtype=torch.bool, device=device) if known is None else ~known
        self._start = self._open.sum(1).double()
        self._tokens = torch.full((batch, tokens), -1, device=device)
        self._planned = policy.open_before() if known is None else None
        every = self._index[0]
        read = Read((policy.num_condition + every,), (every,), (torch.ones(tokens, device=device),), True)
        self._forward = replace(first, targets=every, read=read)
        self.trial = -1

    def next(self) -> Forward | None:
        """The same pass every time: all slots, all tokens; what changes is which of them are fed as the mask."""
        policy = self._policy
        self.trial += 1
        if self.trial == policy.steps:
            return None
        opened = self._open.sum(1) if self._planned is None else self._planned[self.trial]
        self.decided = policy.num_tokens - opened
        remaining = 1 - (self.trial + 1) / policy.steps
        self._noise = policy.noise_temperature * remaining
        self.draw_temperature = self._noise if policy.draw_temperature is None else policy.draw_temperature
        if policy.softmax_annealing:
            self.softmax_temperature = SHARPEST + (SOFTEST - SHARPEST) * remaining
        return self._forward

    def settle(self, drawn: Tensor, scores: Tensor | None) -> Tensor:
        """Keep the most confident tokens and open the others again."""
        assert scores is not None
        policy = self._policy
        self._tokens = torch.where(self._open, drawn, self._tokens)
        if self.trial < policy.steps - 1:
            values = scores.float().log_softmax(-1) if policy.confidence == "log-probability" else scores
            confidence = values.gather(2, drawn[:, :, None])[:, :, 0]
            if self._noise:
                trial = torch.full((len(drawn), 1), self.trial, device=drawn.device)
                confidence = confidence + self._noise * gumbel(self._uniform(self._index, trial, CONFIDENCE))
            rank = confidence.masked_fill(~self._open, float("inf")).argsort(dim=1, stable=True).argsort(1)
            count = policy.open_after(self.trial, self._start, self._open.sum(1))
            self._open = rank < count[:, None]
        else:
            self._open = torch.zeros_like(self._open)
        return self._tokens.masked_fill(self._open, -1)


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise from uniform numbers in [0, 1), bounded at both ends."""
    return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
