"""Adaptive row starts of ZipAR: a row's first token is accepted once more context no longer changes it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.schedules.course import Course, Policy, Uniform
from vgen.schedules.plan import Feed, Forward, Read

ACCEPT, RESAMPLE = 1, 2


@dataclass(frozen=True)
class AdaptiveRows(Policy):
    """Rows of a raster-trained model side by side, each starting when its first token is stable.

    As ZipAR's later paper is summarised (zipar.md section 5), in our reading. Once the row above has ``window``
    tokens, a candidate for the row's first token is drawn. Every later pass, with one more token of the row above,
    computes the distribution p anew and accepts the candidate x, drawn from d, with probability min(1, p(x) / d(x)).
    A rejected candidate is replaced by a draw from the normalised max(0, p - d), which is tested in the next pass
    against its own distribution. When the row above is complete the distribution is the exact one, and accepted or
    replaced the token stands. Samples of a batch keep row states of their own.

    Attributes:
        height: number of rows H.
        width: tokens per row W.
        window: tokens of the row above before a candidate is drawn, 1 <= window < W.
        num_condition: number of condition slots C.
        overlap_first_row: the second row may start while the first is decoded.
    """

    height: int
    width: int
    window: int
    num_condition: int
    overlap_first_row: bool

    @property
    def lanes(self) -> int:
        """Rows that can be busy at once."""
        return min(self.height, (self.width + 1) // (self.window + 1) + 1)

    @property
    def num_rows(self) -> int:
        """Cache rows: every slot of the raster order and one that takes what nobody reads."""
        return self.num_condition + self.height * self.width + 1

    def start(self, first: Forward, batch: int, uniform: Uniform, known: Tensor | None) -> Course:
        """Begin a batch; given tokens replace what is drawn, in the same passes."""
        return AdaptiveCourse(self, first, batch, uniform)


class AdaptiveCourse(Course):
    """The row states of one batch; arguments as in :meth:`AdaptiveRows.start`."""

    needs_probabilities = True

    def __init__(self, rows: AdaptiveRows, first: Forward, batch: int, uniform: Uniform) -> None:
        device = first.rows.device
        self._rows, self._first, self._uniform = rows, first, uniform
        self._known = torch.zeros(batch, rows.height, dtype=torch.int64, device=device)
        self._cached = torch.zeros(batch, rows.height * rows.width + 1, dtype=torch.bool, device=device)
        self._candidate = torch.zeros(batch, dtype=torch.int64, device=device)
        self._density: Tensor | None = None
        self._tests = torch.full((batch,), -1, device=device)
        self._pass = -1
        self.decided = self._known.sum(1)

    def next(self) -> Forward | None:
        """The next pass: every busy row of every sample by one token."""
        rows = self._rows
        self._pass += 1
        self.decided = self._known.sum(1)
        if self._pass == 0:
            return self._first
        shortest = 2 * rows.width if rows.height > 1 else rows.width
        if (rows.overlap_first_row or self._pass >= shortest) and bool((self._known == rows.width).all()):
            return None
        return self._busy_rows()

    def _busy_rows(self) -> Forward:
        rows, width, nothing = self._rows, self._rows.width, self._rows.height * self._rows.width
        batch, device = len(self._known), self._known.device
        complete = (self._known == width) & self._cached[:, width - 1 : -1 : width]
        first = complete.long().cumprod(1).sum(1)
        row = first[:, None] + torch.arange(rows.lanes, device=device)
        exists = row < rows.height
        row = row.clamp(max=rows.height - 1)
        known = self._known.gather(1, row)
        above = torch.where(row > 0, self._known.gather(1, (row - 1).clamp(min=0)), 0)
        below = torch.where(row + 1 < rows.height, self._known.gather(1, (row + 1).clamp(max=rows.height - 1)), 0)

        needed = torch.where((row == 1) & (not rows.overlap_first_row), width, rows.window)
        starts = exists & (known == 0) & (row > 0) & (above >= needed)
        runs = exists & (known > 0) & (known < width)
        last = row * width + width - 1
        refeeds = exists & (known == width) & (below > 0) & ~self._cached.gather(1, last)
        active, decides = starts | runs | refeeds, starts | runs

        slot = row * width + known - 1
        true = ~starts | (above == width)
        two_above = (row - 2).clamp(min=0)
        stand_in = two_above * width + self._known.gather(1, two_above) - 1
        fed = torch.where(active, torch.where(true, slot, stand_in), nothing)
        place = torch.where(active, slot, nothing)
        self._trial, self._exact, self._advance, self._row = starts, starts & (above == width), runs, row
        self._targets = torch.where(decides, slot + 1, nothing)

        self._cached.scatter_(1, torch.where(true & active, slot, nothing), torch.ones_like(active))
        self._cached[:, nothing] = False
        order = torch.arange(nothing + 1, device=device)
        seen = self._cached[:, None, :] & (order < place[:, :, None]) | (order == place[:, :, None])
        mask = torch.cat([active[:, :, None].expand(-1, -1, rows.num_condition), seen], dim=2)
        shared = torch.arange(rows.lanes, device=device)
        feed = Feed(
            slots=shared,
            conditions=shared[:0],
            tokens=fed,
            learned=shared[:0],
            queries=shared[:0],
            arrange=None,
            position=torch.where(active, slot, -1),
            target=torch.where(active, slot + 1, -1).clamp(max=nothing - 1),
        )
        weights = torch.ones(rows.lanes, device=device)
        return Forward(
            slots=shared,
            feed=feed,
            rows=rows.num_condition + place,
            row_start=-1,
            prefix=rows.num_rows,
            settled=0,
            mask=mask[:, None],
            targets=self._targets,
            read=Read((shared.expand(batch, -1),), (shared,), (weights,), True),
        )

    def settle(self, drawn: Tensor, scores: Tensor | None) -> Tensor:
        """Accept, replace or keep the candidates of rows that want to start; running rows take what was drawn."""
        assert scores is not None
        if self._pass == 0:
            self._known[:, 0] = 1
            return drawn
        lane = self._trial.long().argmax(1, keepdim=True)
        on_trial = self._trial.any(1)
        target = self._targets.gather(1, lane)
        fresh = scores.gather(1, lane[:, :, None].expand(-1, -1, scores.shape[2]))[:, 0].double()
        held = on_trial & (self._tests >= 0)
        density = torch.zeros_like(fresh) if self._density is None else self._density
        accept_at, resample_at = (self._draw(target, stream) for stream in (ACCEPT, RESAMPLE))

        mine = self._candidate[:, None]
        accepted = held & (accept_at * density.gather(1, mine)[:, 0] < fresh.gather(1, mine)[:, 0])
        residual = (fresh - density).clamp(min=0)
        total = residual.sum(1, keepdim=True)
        residual = torch.where(total > 0, residual / total.clamp(min=1e-300), fresh)
        replacement = _invert(residual, resample_at)

        first_draw = drawn.gather(1, lane)[:, 0]
        token = torch.where(held, torch.where(accepted, self._candidate, replacement), first_draw)
        exact = self._exact.gather(1, lane)[:, 0]
        starts = on_trial & (accepted | exact)
        self._density = torch.where(held[:, None], torch.where(accepted[:, None], density, residual), fresh)
        self._candidate = torch.where(on_trial, token, self._candidate)
        self._tests = torch.where(starts, -1, torch.where(on_trial, self._tests + 1, self._tests))

        advance = self._advance.long().scatter(1, lane, (starts[:, None] | self._advance.gather(1, lane)).long())
        self._known.scatter_add_(1, self._row, advance)
        return torch.where(self._trial, token[:, None], drawn)

    def _draw(self, target: Tensor, stream: int) -> Tensor:
        """One uniform number per sample, keyed by position and number of tests."""
        target = target.clamp(max=self._rows.height * self._rows.width - 1)
        return self._uniform(target, self._tests[:, None] + 1, stream)[:, 0]


def _invert(density: Tensor, uniform: Tensor) -> Tensor:
    """Draw int64 [B] from densities float64 [B, V] with uniform float64 [B]."""
    cumulative = density.cumsum(1)
    threshold = (uniform * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=density.shape[1] - 1)
