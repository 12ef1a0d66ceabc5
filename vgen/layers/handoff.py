"""What a kernel that sums up the residual stream leaves for the norm behind it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Handoff:
    """Half of an RMS norm, done where its input was made.

    Attributes:
        of: the input, [B, F, dim].
        scaled: the same times the learned scale of the norm, [B, F, dim].
        squares: float32 [parts, B F], sums of squares of stretches of its rows.
    """

    of: Tensor
    scaled: Tensor
    squares: Tensor


class Relay:
    """Takes a handoff from one block to the next.

    Attributes:
        last: what the last block left; it holds for its result only, not for what others make of that.
    """

    def __init__(self) -> None:
        self.last: Handoff | None = None

    def for_norm_of(self, x: Tensor) -> Handoff | None:
        """What was left for a norm of x."""
        return self.last if self.last is not None and self.last.of is x else None
