"""Fewer tokens per sample: the first k tokens, for tokenizers that decode prefixes (FlexTok, arXiv 2502.13967)."""

from vgen.errors import UserError
from vgen.schedules.plan import Plan
from vgen.tokenizers.base import Tokenizer


def passes_for(num_tokens: int, plan: Plan, tokenizer: Tokenizer) -> int:
    """Number of passes after which exactly the first tokens of a picture are decided.

    Args:
        num_tokens: how many tokens k are wanted.
        plan: decode order.
        tokenizer: turns the tokens into pixels.

    Raises:
        UserError: if the tokenizer needs all its tokens, k is out of range, or no number of passes decides tokens
            0..k-1 and no others.
    """
    if not tokenizer.decodes_prefixes:
        raise UserError(
            f"num_tokens={num_tokens}: this tokenizer needs all its {tokenizer.num_tokens} tokens; only one that was "
            "trained for every length, such as FlexTok, decodes fewer"
        )
    if not isinstance(num_tokens, int) or not 1 <= num_tokens <= plan.num_tokens:
        raise UserError(f"num_tokens={num_tokens} must lie in 1..{plan.num_tokens}, or be null for all tokens")
    if plan.policy is not None or plan.shuffled:
        raise UserError(
            f"num_tokens={num_tokens}: which tokens schedule '{plan.name}' decides first is known only while it "
            "decodes; use schedule=raster"
        )
    step = plan.step_of()
    passes = 1 + int(step[:num_tokens].max())
    if bool((step[num_tokens:] < passes).any()):
        raise UserError(
            f"num_tokens={num_tokens}: no number of passes of schedule '{plan.name}' decides tokens "
            f"0..{num_tokens - 1} and no others; use schedule=raster"
        )
    return passes
