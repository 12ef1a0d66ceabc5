"""Random networks and plans of the sizes that benchmarks are run at."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from vgen.errors import UserError
from vgen.generators.conditioning import ClassCondition
from vgen.generators.transformer import Transformer
from vgen.schedules.neighboring import neighboring
from vgen.schedules.parallel import parallel
from vgen.schedules.plan import Grid, Plan
from vgen.schedules.randar import randar
from vgen.schedules.raster import raster
from vgen.schedules.zipar import zipar

SIZES = {  # name: width, depth, heads
    "tiny": (64, 2, 2),
    "small": (512, 12, 8),  # experiment=cifar10_orders
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
}
LEARNED_POSITIONS: dict[str, Any] = {"rope": "none", "positions": "own"}
ORDERS: dict[str, Callable[[Grid], Plan]] = {
    "raster": lambda grid: raster(grid=grid),
    "neighboring": lambda grid: neighboring(grid=grid),
    "parallel-4": lambda grid: parallel(grid=grid, regions=4),
    "parallel-16": lambda grid: parallel(grid=grid, regions=16),
    "zipar-8": lambda grid: zipar(grid=grid, window=min(8, grid[-1])),
    "zipar-2": lambda grid: zipar(grid=grid, window=2),
    "random-88": lambda grid: randar(grid=grid, steps=min(88, prod(grid))),
}


def make_plan(order: str, grid: Grid) -> Plan:
    """A plan by name.

    Raises:
        UserError: for an unknown name.
    """
    if order not in ORDERS:
        raise UserError(f"--orders {order} is unknown; choose of {', '.join(ORDERS)}")
    return ORDERS[order](grid)


def make_generator(
    size: str,
    plan: Plan,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vocab_size: int = 16384,
    num_classes: int = 1000,
) -> Transformer:
    """A generator with random weights that fits a plan, in eval mode.

    Pictures (two axes) have the rotary code, as LlamaGen's and NAR's; clips (three axes) learned positions, as LARP's
    and NAR's for video.

    Raises:
        UserError: for an unknown size.
    """
    if size not in SIZES:
        raise UserError(f"--size {size} is unknown; choose of {', '.join(SIZES)}")
    dim, depth, heads = SIZES[size]
    with torch.device(device):
        generator = Transformer(
            vocab_size=vocab_size,
            grid=plan.grid,
            condition=ClassCondition(num_classes=num_classes, dim=dim),
            dim=dim,
            depth=depth,
            heads=heads,
            num_readouts=plan.num_heads,
            num_learned=plan.num_learned,
            position_queries=plan.has_queries,
            **(LEARNED_POSITIONS if len(plan.grid) == 3 and not plan.has_queries else {}),
        )
        torch.nn.init.normal_(generator.outputs[0].weight, std=0.02)
    return generator.to(device, dtype).eval()
