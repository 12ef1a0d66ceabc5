"""Exponential moving average of the trainable parameters of one network."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """A float32 average of named parameters, kept outside the network.

    The average is not a module: it never appears in a state dict, is not moved with the network and is stored in
    checkpoints under its own key.

    Args:
        parameters: trainable parameters by name.
        decay: weight of the old average per update, in [0, 1).
        warmup: use ``min(decay, (1 + n) / (10 + n))`` at update n, counted from 0, and copy at the first one, so that
            the average forgets the initial weights quickly (the rule of diffusers, after TensorFlow's).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, decay: float, warmup: bool) -> None:
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._parameters = dict(parameters)
        self._average = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        self._swapped = False

    def match_device(self) -> None:
        """Move the averages to where the parameters are now."""
        self._average = {name: self._average[name].to(p.device) for name, p in self._parameters.items()}

    def decay_at(self, update: int) -> float:
        """Weight of the old average at an update, counted from 0."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + update) / (10 + update)) if update > 0 else 0.0

    @torch.no_grad()
    def update(self) -> None:
        """Fold the current parameters into the average."""
        assert not self._swapped, "the average cannot be updated while it is swapped in"
        decay = self.decay_at(self.updates)
        self.updates += 1
        current = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self._average.values()), current, 1.0 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the network hold the averaged weights inside the context, and its own again afterwards."""
        assert not self._swapped, "the average is already swapped in"
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._copy_in(self._average)
        self._swapped = True
        try:
            yield
        finally:
            self._copy_in(own)
            self._swapped = False

    def state_dict(self) -> dict:
        """Plain containers and tensors: number of updates and averages by parameter name."""
        return {"updates": self.updates, "average": dict(self._average)}

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` gave; names and shapes have been compared by the caller."""
        self.updates = int(state["updates"])
        for name, average in self._average.items():
            average.copy_(state["average"][name])

    @torch.no_grad()
    def _copy_in(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
