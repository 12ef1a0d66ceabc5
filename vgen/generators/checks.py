"""What a transformer's switches refuse, each with the key that mends it."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from vgen.errors import UserError
from vgen.generators.conditioning import ClassCondition, TextCondition, TextContext, TokenCondition
from vgen.generators.joint_text import JointText
from vgen.generators.latent_head import LatentHead

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
    condition: ClassCondition | TextCondition | TextContext | TokenCondition | JointText,
    directions: Sequence[Sequence[int]] | None,
) -> tuple[AdaLNInput, ...]:
    """The inputs of the modulation, or UserError where the condition or the directions do not go with them."""
    if unknown := [name for name in adaln if name not in get_args(AdaLNInput)]:
        raise UserError(f"generator.adaln={list(adaln)}: {unknown[0]} is unknown; choose of condition, step, direction")
    if "condition" in adaln and not isinstance(condition, ClassCondition | JointText):
        raise UserError("generator.adaln=[condition] takes the class vector; this generator has no class condition")
    if adaln and isinstance(condition, TextContext):
        raise UserError(f"generator.adaln={list(adaln)} modulates blocks without cross-attention; leave it empty")
    if ("direction" in adaln) != (directions is not None):
        raise UserError("generator.directions lists the moves of generator.adaln=[direction]; give both or neither")
    return tuple(adaln)


def refused_streams(
    condition: object, adaln: Sequence[AdaLNInput], *, rope: str, norm_position: str, long_skips: bool
) -> list[tuple[Any, str]]:
    """What :func:`check_combinations` refuses of a network with streams of text and tokens."""
    joint = isinstance(condition, JointText)
    return [
        (
            joint and tuple(adaln) != ("condition",),
            "a condition of joint text modulates its blocks; set generator.adaln=[condition]",
        ),
        (joint and rope != "none", "joint streams of text and tokens have no rotary codes; set generator.rope=none"),
        (joint and (norm_position == "post" or long_skips), "joint streams are pre-norm and have no long skips"),
    ]


def refused_outputs(
    latent_head: LatentHead | None,
    *,
    vocab_size: int,
    tied_output: bool,
    codebook_dim: int | None,
    head_bias: bool,
    num_readouts: int,
) -> list[tuple[Any, str]]:
    """What :func:`check_combinations` refuses of the way tokens enter and leave a network."""
    continuous = latent_head is not None
    return [
        (
            tied_output and (continuous or codebook_dim is not None or head_bias or num_readouts > 1),
            "generator.tied_output shares a learned table of token embeddings: it has no bias, goes with one output "
            "head, and with neither generator.codebook_dim nor generator.latent_head",
        ),
        (
            continuous != (vocab_size == 0),
            f"generator.vocab_size={vocab_size}: continuous tokens (generator.latent_head) have a vocabulary of 0, "
            "others a larger one",
        ),
        (continuous and codebook_dim is not None, "generator.latent_head has no codebook: set codebook_dim=null"),
    ]
