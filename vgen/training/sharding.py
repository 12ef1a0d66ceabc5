"""Fully sharded training of generators."""

from datetime import timedelta
from typing import Literal

from pytorch_lightning.strategies import FSDPStrategy
from torch import nn

from vgen.generators.block import Block
from vgen.generators.joint_block import JointBlock


def is_unit(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """Whether a module is gathered as a whole: blocks, but not those that a joint block runs in parts.

    Arguments as torch's wrapping policies take them; with ``recurse`` whether to look at what a module holds.
    """
    return recurse or isinstance(module, JointBlock) or (isinstance(module, Block) and not module.in_parts)


def fsdp(
    *, sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"], timeout_minutes: int
) -> FSDPStrategy:
    """Shard by transformer block; checkpoints hold the whole state in one file."""
    return FSDPStrategy(
        auto_wrap_policy=is_unit,
        sharding_strategy=sharding_strategy,
        state_dict_type="full",
        timeout=timedelta(minutes=timeout_minutes),
    )
