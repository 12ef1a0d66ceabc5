"""The few collective operations of sampling and evaluation jobs that are sharded over processes."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vgen import runtime
from vgen.errors import UserError


class Processes:
    """Sums and gathers over the processes of one job; with one process every call is the identity.

    Args:
        rank: of this process.
        world_size: number of processes.
        group: process group to talk over; None is the default one.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, group: Any = None):
        self.rank = rank
        self.world_size = world_size
        self.group = group

    def share(self, count: int) -> range:
        """Indices below ``count`` that belong to this process: rank, rank + world size, ..."""
        return range(self.rank, count, self.world_size)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier(self.group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of the processes' tensors of one shape."""
        if self.world_size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def agree(self, failure: BaseException | None) -> None:
        """Fail on all processes if one has failed, so that none waits for another that has stopped.

        Args:
            failure: what went wrong in this process, None if nothing did.

        Raises:
            UserError: if another process failed; this process's own failure is raised as it is.
        """
        failed = int(self.sum(torch.tensor(float(failure is not None))))
        if failure is not None:
            raise failure
        if failed:
            raise UserError(f"{failed} of the {self.world_size} processes failed; their messages say why")

    def gather(self, index: Tensor, rows: Tensor) -> Tensor:
        """Collect rows on process 0 in the order of their sample index, so that no result depends on the sharding.

        Args:
            index: int64 [n] sample index of every row of this process; n may differ between processes and may be 0.
            rows: [n, ...] values on the CPU; same dtype and trailing shape in all processes.

        Returns:
            All rows sorted by index on process 0, an empty tensor elsewhere.
        """
        if self.world_size == 1:
            in_order = bool((index[1:] > index[:-1]).all())
            return rows if in_order else rows[index.argsort()]  # the copy of 50,000 features would be 0.4 GB
        count = torch.tensor([len(rows)])
        counts = [torch.zeros_like(count) for _ in range(self.world_size)]
        dist.all_gather(counts, count, group=self.group)
        sizes = [int(c) for c in counts]
        indices, parts = (self._gather_padded(t, sizes) for t in (index.cpu(), rows.cpu()))
        if self.rank != 0:
            return rows.new_empty((0, *rows.shape[1:]), device="cpu")
        return torch.cat(parts)[torch.cat(indices).argsort()]

    def _gather_padded(self, tensor: Tensor, sizes: list[int]) -> list[Tensor]:
        """Gather tensors of unequal length on process 0; collectives want equal shapes, so the tail is cut after."""
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else None
        dist.gather(padded, parts, dst=0, group=self.group)
        return [part[:size] for part, size in zip(parts or [], sizes, strict=False)]


@contextmanager
def joined(device: torch.device, *, stay: bool = False) -> Iterator[Processes]:
    """Join the processes started together by torchrun or SLURM, and leave at the end.

    Args:
        device: of this process.
        stay: leave only when the program ends, for a program that joins several times: a meeting place that has been
            left still tells the old addresses.

    Raises:
        UserError: if more than one process was announced but there is no address to meet at.
    """
    if runtime.world_size() == 1:
        yield Processes()
        return
    owned = not dist.is_initialized()
    if owned:
        if "MASTER_ADDR" not in os.environ:
            raise UserError(
                "several processes without MASTER_ADDR; start with torchrun --nproc-per-node=N <script> ..."
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            rank=runtime.rank(),
            world_size=runtime.world_size(),
        )
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        if owned and stay:
            atexit.register(dist.destroy_process_group)
        elif owned:
            dist.destroy_process_group()
