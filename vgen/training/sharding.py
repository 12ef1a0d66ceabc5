"""Fully sharded training of generators."""

from datetime import timedelta
from typing import Literal

from pytorch_lightning.strategies import FSDPStrategy

from vgen.generators.transformer import Block


def fsdp(
    *, sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"], timeout_minutes: int
) -> FSDPStrategy:
    """Shard by transformer block; checkpoints hold the whole state in one file."""
    return FSDPStrategy(
        auto_wrap_policy={Block},
        sharding_strategy=sharding_strategy,
        state_dict_type="full",
        timeout=timedelta(minutes=timeout_minutes),
    )
