"""What the two processes of a test do; little is imported, because each of them starts afresh."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vgen.evaluation.frechet import FeatureStatistics
from vgen.processes import Processes

WORLD = 2
# Rows of each process: every second one, or none at all for the first.
SHARES = {
    "even": lambda features, rank: features[rank::WORLD],
    "one empty": lambda features, rank: features[: rank * len(features)],
}


def rows(count: int = 101, dim: int = 20) -> Tensor:
    """Features with a mean that is large against their spread."""
    return 300 + torch.randn(count, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def streamed(features: Tensor, batch: int = 7) -> FeatureStatistics:
    """Statistics of one pass over features."""
    statistics = FeatureStatistics(features.shape[1])
    for part in features.split(batch):
        statistics.update(part)
    return statistics


def stream_share(rank: int, folder: Path) -> None:
    """Accumulate a share, merge it with the other process and save the outcome."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    for name, share in SHARES.items():
        statistics = streamed(share(rows(), rank))
        statistics.reduce(Processes(rank, WORLD))
        torch.save((statistics.count, statistics.mean, statistics.scatter), folder / f"{name} {rank}.pt")
    dist.destroy_process_group()
