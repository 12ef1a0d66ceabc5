"""Rows of many batches in one tensor, held once: a list of batches and its concatenation would be held twice."""

import torch
from torch import Tensor


class Rows:
    """A tensor on the CPU that grows by batches.

    Args:
        capacity: rows expected; memory is taken as they come. More are accepted, at the price of a copy.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.count = 0
        self._buffer: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Append a batch [B, ...] of the dtype and trailing shape of the first one."""
        end = self.count + len(values)
        if self._buffer is None:
            self._buffer = torch.empty(max(self.capacity, end), *values.shape[1:], dtype=values.dtype)
        elif end > len(self._buffer):
            room = self._buffer.new_empty(end, *self._buffer.shape[1:])
            self._buffer = torch.cat([self._buffer[: self.count], room])
        self._buffer[self.count : end] = values
        self.count = end

    def tensor(self) -> Tensor | None:
        """All rows [n, ...], None if no batch was added."""
        return None if self._buffer is None else self._buffer[: self.count]
