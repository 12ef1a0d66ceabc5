"""How the decoding loop walks a plan: pass by pass, fixed beforehand or chosen while decoding."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from vgen.schedules.plan import Forward

Uniform = Callable[[Tensor, Tensor, int], Tensor]


class Course(ABC):
    """The passes of one batch.

    Attributes:
        decided: tokens known before the pass that :meth:`next` returned last; int64 [B] where samples differ.
        trial: how often the tokens of the pass have been drawn before, which keys their random numbers.
        softmax_temperature: divides the guided logits of the pass, before everything else.
        draw_temperature: divides the filtered logits once more, for the draw alone; 0 = take the most likely token.
        needs_probabilities: :meth:`settle` wants the distributions the tokens were drawn from.
        needs_logits: :meth:`settle` wants the filtered logits.
    """

    decided: int | Tensor = 0
    trial = 0
    softmax_temperature = 1.0
    draw_temperature = 1.0
    needs_probabilities = False
    needs_logits = False

    @abstractmethod
    def next(self) -> Forward | None:
        """The next pass, on the device of the batch; None when every token is decided."""

    def settle(self, drawn: Tensor, scores: Tensor | None) -> Tensor:
        """What becomes of the tokens drawn for the targets of the pass.

        Args:
            drawn: int64 [B, D].
            scores: float [B, D, V], the probabilities they were drawn from or the logits, if asked for.

        Returns:
            int64 [B, D], tokens to write at the targets, -1 to leave one open; a target that comes up again later is
            overwritten then.
        """
        return drawn


class StaticCourse(Course):
    """The passes of a plan in their order.

    Args:
        forwards: the passes, on the device of the batch.
        decided_before: number of tokens known before each pass.
    """

    def __init__(self, forwards: Sequence[Forward], decided_before: Sequence[int]) -> None:
        self._passes = iter(zip(forwards, decided_before, strict=True))

    def next(self) -> Forward | None:
        """The next pass of the plan."""
        forward, self.decided = next(self._passes, (None, self.decided))
        return forward


class Policy(ABC):
    """An order whose passes depend on what was drawn; what a plan holds, before it meets a batch."""

    @property
    def num_passes(self) -> int | None:
        """Passes of every run; None where that depends on the run too."""
        return None

    @abstractmethod
    def start(self, first: Forward, batch: int, uniform: Uniform, known: Tensor | None) -> Course:
        """Begin a batch.

        Args:
            first: the pass that feeds the condition, on the device of the batch.
            batch: number of samples B.
            uniform: (order indices int64 [B, n], trial int64 [B, 1], stream) -> float64 [B, n], keyed random numbers in
                [0, 1).
            known: bool [B, N], order indices that are given; None = none.
        """
