"""Sampling settings, validated when they are made."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from vgen.errors import UserError

GuidanceSchedule = Literal["constant", "linear", "power-cosine"]
Convention = Literal["plain", "one-plus"]
Along = Literal["tokens", "passes"]
Counted = Literal["before", "after"]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: logits = uncond + w (cond - uncond), in float32.

    With t = share of tokens decided, or of passes done, before the pass (or after it, see ``counted``):
    ``constant`` w = scale; ``linear`` w = initial + (scale - initial) t (RandAR);
    ``power-cosine`` w = 1 + (scale - 1) (1 - cos(pi t^power)) / 2 (RAR).
    In the ``one-plus`` convention the schedule gives w - 1: logits = cond + (w - 1) (cond - uncond), as TiTok's
    generators count with constant and linear guidance (and start linear at ``initial`` 0), and MaskGen's with
    power-cosine. Continuous tokens are guided likewise in the noise that every diffusion step predicts.

    Attributes:
        scale: guidance scale, >= 0; conditional logits alone at 1, or at 0 in the one-plus convention.
        schedule: how w moves while decoding.
        convention: ``plain`` or ``one-plus``; power-cosine is plain for TiTok and RAR.
        along: what t counts, ``tokens`` or ``passes``.
        counted: the pass itself counts (``after``, MaskGen) or not (``before``). Along tokens the last pass then counts
            as leaving one open, as in MAR's code; that MaskGen does the same is inferred.
        initial: first weight of linear, >= 0.
        power: exponent of power-cosine, >= 0; 0 gives w = scale throughout.
        start: tokens decided (or passes done) before which w = 1.
        end: tokens decided (or passes done) from which on w = 1; null = never. LlamaGen's cfg_interval c is
            end = c + 2.
    """

    scale: float = 1.0
    schedule: GuidanceSchedule = "constant"
    convention: Convention = "plain"
    along: Along = "tokens"
    counted: Counted = "before"
    initial: float = 1.0
    power: float = 1.0
    start: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: for a value out of range, naming its key.
        """
        if not (math.isfinite(self.scale) and 0 <= self.scale <= 100):
            raise UserError(f"sampling.guidance.scale={self.scale} must lie in [0, 100] (1 = no guidance)")
        if self.schedule not in get_args(GuidanceSchedule):
            names = ", ".join(get_args(GuidanceSchedule))
            raise UserError(f"sampling.guidance.schedule={self.schedule} is unknown; choose one of {names}")
        if self.convention not in get_args(Convention):
            raise UserError(f"sampling.guidance.convention={self.convention} is unknown; choose plain or one-plus")
        if self.along not in get_args(Along):
            raise UserError(f"sampling.guidance.along={self.along} is unknown; choose tokens or passes")
        if self.counted not in get_args(Counted):
            raise UserError(f"sampling.guidance.counted={self.counted} is unknown; choose before or after")
        if not (math.isfinite(self.initial) and 0 <= self.initial <= 100):
            raise UserError(f"sampling.guidance.initial={self.initial} must lie in [0, 100]")
        if not (math.isfinite(self.power) and self.power >= 0):
            raise UserError(f"sampling.guidance.power={self.power} must be a number >= 0")
        if self.start < 0 or (self.end is not None and self.end < self.start):
            raise UserError(f"sampling.guidance: start={self.start}, end={self.end} must satisfy 0 <= start <= end")

    def weight(self, decided: int, total: int) -> float:
        """Guidance weight w of a pass that starts with ``decided`` of ``total`` tokens known (or passes done).

        With ``counted=after``, of a pass that ends with so many.
        """
        if decided < self.start or (self.end is not None and decided >= self.end):
            return 1.0
        share, offset = decided / total, 1.0 if self.convention == "one-plus" else 0.0
        if self.schedule == "linear":
            return offset + self.initial + (self.scale - self.initial) * share
        if self.schedule == "power-cosine":
            return offset + 1.0 + (self.scale - 1.0) * (1.0 - math.cos(math.pi * share**self.power)) / 2.0
        return offset + self.scale


@dataclass(frozen=True)
class SpatialGuidance:
    """Guidance of an extrapolation, away from a branch that sees a part of the given tokens (RandAR section 8).

    With A = conditional, B = unconditional, C = unconditional with a part of the given tokens hidden:
    logits = C + w (A - B) + v (B - C), where w is the class guidance and v = 1 + (scale - 1) times the share decided.

    Attributes:
        scale: last v, >= 0.
        hidden: share of the given tokens hidden from C, in (0, 1].
    """

    scale: float = 2.5
    hidden: float = 0.5

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: for a value out of range, naming its key.
        """
        if not (math.isfinite(self.scale) and 0 <= self.scale <= 100):
            raise UserError(f"extrapolate.spatial.scale={self.scale} must lie in [0, 100]")
        if not 0 < self.hidden <= 1:
            raise UserError(f"extrapolate.spatial.hidden={self.hidden} must lie in (0, 1]")

    def weight(self, share: float) -> float:
        """Weight v when a share of the tokens is known."""
        return 1.0 + (self.scale - 1.0) * share


@dataclass(frozen=True)
class Sampling:
    """Everything that decides which tokens are drawn.

    Attributes:
        seed: with the sample's index and the token's position it keys every random number.
        temperature: > 0; logits are divided by it.
        top_k: >= 0; 0 = off.
        top_p: in (0, 1]; 1 = off.
        greedy: take the most likely token.
        guidance: classifier-free guidance.
        diffusion_steps: steps in which continuous tokens are drawn; null = 100 (MaskGen), and for token ids, which have
            none. The temperature of continuous tokens is a factor of the noise in every step.
    """

    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    guidance: Guidance = field(default_factory=Guidance)
    diffusion_steps: int | None = None

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: for a value out of range, naming its key.
        """
        if not (math.isfinite(self.temperature) and 0 < self.temperature <= 100):
            raise UserError(
                f"sampling.temperature={self.temperature} must lie in (0, 100]; for the most likely token use "
                "sampling.greedy=true"
            )
        if self.top_k < 0:
            raise UserError(f"sampling.top_k={self.top_k} must be >= 0 (0 = off)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p={self.top_p} must lie in (0, 1] (1 = off)")
        if self.diffusion_steps is not None and self.diffusion_steps < 1:
            raise UserError(f"sampling.diffusion_steps={self.diffusion_steps} must be at least 1, or null")
        if self.seed < 0:
            raise UserError(f"sampling.seed={self.seed} must be >= 0")
