"""What a transformer's switches refuse, each with the key that mends it."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from vgen.errors import UserError
from vgen.generators.conditioning import ClassCondition, TextCondition, TextContext, TokenCondition

AdaLNInput = Literal["condition", "step", "direction"]


def check_choices(**choices: tuple[object, tuple]) -> None:
    """Raise UserError for the first switch, given as name=(value, allowed values), that has another value."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            words = ", ".join("null" if choice is None else choice for choice in allowed)
            raise UserError(f"generator.{name}={value} is unknown; choose one of {words}")


def check_combinations(*refused: tuple[Any, str]) -> None:
    """Raise UserError with the message of the first (condition, message) that holds."""
    for wrong, message in refused:
        if wrong:
            raise UserError(message)


def check_adaln(
    adaln: Sequence[AdaLNInput],
    condition: ClassCondition | TextCondition | TextContext | TokenCondition,
    directions: Sequence[Sequence[int]] | None,
) -> tuple[AdaLNInput, ...]:
    """The inputs of the modulation, or UserError where the condition or the directions do not go with them."""
    if unknown := [name for name in adaln if name not in get_args(AdaLNInput)]:
        raise UserError(f"generator.adaln={list(adaln)}: {unknown[0]} is unknown; choose of condition, step, direction")
    if "condition" in adaln and not isinstance(condition, ClassCondition):
        raise UserError("generator.adaln=[condition] takes the class vector; this generator has no class condition")
    if adaln and isinstance(condition, TextContext):
        raise UserError(f"generator.adaln={list(adaln)} modulates blocks without cross-attention; leave it empty")
    if ("direction" in adaln) != (directions is not None):
        raise UserError("generator.directions lists the moves of generator.adaln=[direction]; give both or neither")
    return tuple(adaln)
