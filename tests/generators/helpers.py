"""Tiny generators for tests."""

import torch

from vgen.generators.conditioning import ClassCondition
from vgen.generators.transformer import Transformer
from vgen.schedules.plan import Plan


def tiny_generator(plan: Plan, *, vocab_size: int = 23, num_classes: int = 5, seed: int = 0, **options) -> Transformer:
    """A random network that fits a plan, with an output head that is not zero, in eval mode."""
    torch.manual_seed(seed)
    sizes = {"dim": 32, "depth": 2, "heads": 2, "ffn_multiple_of": 16} | options
    if plan.any_order and not plan.has_queries:
        sizes.setdefault("positions", "own_target")
    generator = Transformer(
        vocab_size=vocab_size,
        grid=plan.grid,
        condition=ClassCondition(num_classes=num_classes, dim=sizes["dim"]),
        num_readouts=plan.num_heads,
        num_learned=plan.num_learned,
        position_queries=plan.has_queries,
        mask_token=plan.masking is not None,
        **sizes,
    )
    for parameter in generator.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return generator.eval()
