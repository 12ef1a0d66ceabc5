"""Rectified flow (Liu et al., arXiv 2209.03003): straight paths from data (time 0) to noise (time 1)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.tokenizers.flow_guidance import FlowGuidance

TIMES = ("mode", "logit_normal", "logit_normal_stratified")
SOLVERS = ("euler", "heun")


def noised(clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """The point at time [B] on the path from clean [B, ...] to noise (same shape); its velocity is noise - clean."""
    time = time.view(-1, *[1] * (clean.dim() - 1)).to(clean.dtype)
    return time * noise + (1.0 - time) * clean


@dataclass(frozen=True, kw_only=True)
class TimeSampler:
    """Distribution of the training times (Esser et al., arXiv 2403.03206, section 3.1).

    Attributes:
        kind: ``mode`` (see ``mode_scale``), ``logit_normal`` or ``logit_normal_stratified`` (one time from each of B
            equally likely ranges).
        mode_scale: of ``mode``: 0 is uniform, larger values favour the middle.
        shift: s of the map t -> s t / (1 + (s - 1) t) of every time (equation 23 there); above 1 more times are close
            to the noise, where the decoder has only its tokens to go by.
    """

    kind: str = "mode"
    mode_scale: float = 0.25
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in TIMES:
            raise UserError(f"times.kind={self.kind} is unknown; choose one of {', '.join(TIMES)}")
        if not -1.0 <= self.mode_scale <= 1.75:
            # Outside, the map from u to time is not monotonic (arXiv 2403.03206, equation 20).
            raise UserError(f"times.mode_scale={self.mode_scale} must lie in [-1, 1.75]")
        if not self.shift > 0:
            raise UserError(f"times.shift={self.shift} must be positive")

    def times(self, raw: Tensor) -> Tensor:
        """Times in [0, 1] of random numbers.

        Args:
            raw: [B], standard normal for ``logit_normal``, otherwise uniform in [0, 1).
        """
        time = self._unshifted(raw)
        return self.shift * time / (1.0 + (self.shift - 1.0) * time)

    def _unshifted(self, raw: Tensor) -> Tensor:
        if self.kind == "logit_normal":
            return torch.sigmoid(raw)
        if self.kind == "logit_normal_stratified":
            spread = (torch.arange(len(raw), device=raw.device) + raw) / len(raw)
            return torch.sigmoid(torch.special.ndtri(spread))
        if self.mode_scale == 0:
            return raw
        return 1.0 - raw - self.mode_scale * (torch.cos(torch.pi / 2 * raw).square() - 1.0 + raw)


@dataclass(frozen=True, kw_only=True)
class FlowSampling:
    """How latents are drawn from noise.

    Attributes:
        steps: steps T of equal length from time 1 to 0.
        solver: ``euler``, or ``heun`` (second order, two evaluations per step but the last).
        guidance: see :class:`vgen.tokenizers.flow_guidance.FlowGuidance`.
    """

    steps: int = 20
    solver: str = "euler"
    guidance: FlowGuidance = field(default_factory=FlowGuidance)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"decoding.steps={self.steps} must be at least 1")
        if self.solver not in SOLVERS:
            raise UserError(f"decoding.solver={self.solver} is unknown; choose one of {', '.join(SOLVERS)}")


def integrate(
    velocity: Callable[[Tensor, float], Tensor], noise: Tensor, *, steps: int, solver: str = "euler"
) -> Tensor:
    """Follow a velocity from noise at time 1 to data at time 0.

    Args:
        velocity: function of (x, time), time = steps / steps, ..., 1 / steps.
        noise: start, float32 [B, C, h, w].
        steps: number of equal steps.
        solver: see :class:`FlowSampling`.

    Returns:
        float32, shape of the noise.
    """
    x, dt = noise.float(), 1.0 / steps
    for step in range(steps, 0, -1):
        slope = velocity(x, step / steps).float()
        if solver == "heun" and step > 1:
            ahead = velocity(x - dt * slope, (step - 1) / steps).float()
            slope = (slope + ahead) / 2
        x = x - dt * slope
    return x
