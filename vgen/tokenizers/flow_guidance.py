"""Guidance of a rectified-flow decoder: classifier-free (Ho & Salimans, 2022) and adaptive projected (APG).

APG (Sadat et al., arXiv 2410.02416) keeps the part of the guidance direction that is orthogonal to the
conditional prediction, limits its length and damps it over the steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.errors import UserError

KINDS = ("none", "cfg", "apg")
Scale = float | Callable[[float], float]


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Move from the unconditional prediction past the conditional one."""
    return unconditional + scale * (conditional - unconditional)


def projected(
    conditional: Tensor, difference: Tensor, scale: float, *, eta: float = 0.0, threshold: float = 0.0
) -> Tensor:
    """One step of adaptive projected guidance.

    Args:
        conditional: prediction v_c [B, C, h, w].
        difference: v_c - v_u, with momentum if any, same shape.
        scale: guidance scale; 1 changes nothing.
        eta: weight of the part parallel to the conditional prediction; 1 is classifier-free guidance.
        threshold: largest Euclidean norm of the difference of one sample; 0 or less = no limit.
    """
    if threshold > 0:
        norm = difference.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        difference = difference * (threshold / norm.clamp(min=1e-30)).clamp(max=1.0)
    # Float64 as in the original: the difference is nearly parallel to the prediction when guidance hardly acts.
    wide, direction = difference.double(), conditional.double()
    direction = direction / direction.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, 1, 1, 1)
    parallel = (wide * direction).sum((1, 2, 3), keepdim=True) * direction
    update = (wide - parallel) + eta * parallel
    return conditional + (scale - 1.0) * update.to(conditional.dtype)


@dataclass(frozen=True, kw_only=True)
class FlowGuidance:
    """How conditional and unconditional velocities are combined while sampling.

    Attributes:
        kind: ``none``, ``cfg`` (classifier-free) or ``apg`` (adaptive projected).
        scale: guidance scale, or a function of the time in (0, 1]; a constant 1 means no guidance.
        momentum: of APG: share of the accumulated difference added to the present one (FlexTok: -0.5); 0 = none.
        threshold: of APG: largest norm of the difference (FlexTok: 2.5 for latents of 16 x 32 x 32); 0 = none.
        eta: of APG: weight of the parallel part (FlexTok: 0).
        interval: times (lowest, highest) at which guidance acts; elsewhere the unconditional pass is not made.
    """

    kind: str = "apg"
    scale: Scale = 7.5
    momentum: float = -0.5
    threshold: float = 2.5
    eta: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"guidance.kind={self.kind} is unknown; choose one of {', '.join(KINDS)}")
        if not callable(self.scale) and not self.scale >= 0:
            raise UserError(f"guidance.scale={self.scale} must not be negative (1 = no guidance)")
        if not -1.0 < self.momentum < 1.0:
            raise UserError(f"guidance.momentum={self.momentum} must lie between -1 and 1 (FlexTok uses -0.5)")
        low, high = self.interval
        if not 0.0 <= low <= high <= 1.0:
            raise UserError(f"guidance.interval={list(self.interval)} must be [low, high] within [0, 1]")

    def acts_at(self, time: float) -> bool:
        """Whether the unconditional velocity is needed at a time."""
        constant_one = not callable(self.scale) and self.scale == 1.0
        return self.kind != "none" and not constant_one and self.interval[0] <= time <= self.interval[1]


class GuidedVelocity:
    """The guided velocity along one sampling run; holds the momentum of APG.

    Args:
        conditional: velocity of (x [B, C, h, w], time).
        unconditional: likewise, without the condition.
        guidance: how to combine them.
    """

    def __init__(
        self,
        conditional: Callable[[Tensor, float], Tensor],
        unconditional: Callable[[Tensor, float], Tensor],
        guidance: FlowGuidance,
    ) -> None:
        self.conditional, self.unconditional, self.guidance = conditional, unconditional, guidance
        self._average: Tensor | None = None

    def __call__(self, x: Tensor, time: float) -> Tensor:
        """Velocity at x [B, C, h, w]."""
        with_condition = self.conditional(x, time)
        if not self.guidance.acts_at(time):
            return with_condition
        return self.combine(with_condition, self.unconditional(x, time), time)

    def combine(self, conditional: Tensor, unconditional: Tensor, time: float) -> Tensor:
        """Combine two velocities, advancing the momentum."""
        guidance = self.guidance
        scale = guidance.scale(time) if callable(guidance.scale) else guidance.scale
        with torch.autocast(conditional.device.type, enabled=False):
            if guidance.kind == "cfg":
                return classifier_free(conditional, unconditional, scale)
            difference = conditional - unconditional
            if self._average is not None:
                difference = difference + guidance.momentum * self._average
            self._average = difference
            return projected(conditional, difference, scale, eta=guidance.eta, threshold=guidance.threshold)
