"""The output heads of a network: from hidden states to the logits of targets.

A plan may have a target read at several slots and by several heads; its logits are the mean over these reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgen.generators.readout import Readout, join_heads, shares, weighted
from vgen.layers import fused
from vgen.layers.modulation import Modulator
from vgen.layers.norm import RMSNorm
from vgen.schedules.plan import Read


@dataclass(frozen=True)
class Heads:
    """Output heads over modules that the network keeps, so that the names of its weights do not know of them.

    Attributes:
        norms: per head, in front of its matrix.
        modulations: per head, what AdaLN makes of the norm; none without AdaLN.
        outputs: per head, its matrix; none if tied or if states are wanted.
        tied: [V, dim], rows of the token embedding in place of ``outputs``; None with neither: continuous tokens, whose
            states are read.
        by_kernels: have :func:`vgen.layers.fused.read` do it where it can.
    """

    norms: nn.ModuleList
    modulations: nn.ModuleList
    outputs: nn.ModuleList
    tied: Tensor | None
    by_kernels: bool

    def logits(self, hidden: Sequence[Tensor], read: Read, num_targets: int, modulator: Modulator | None) -> Tensor:
        """Logits of the targets, the mean over their reads.

        Args:
            hidden: one [B, F, dim] per head.
            read: where to read.
            num_targets: number of targets D.
            modulator: conditioning of the slots; None without AdaLN.

        Returns:
            [B, D, V] in the dtype of the products (float32 where a kernel has it at hand), or states [B, D, dim] for
            continuous tokens.
        """
        if self.by_kernels and modulator is None and (logits := self._by_kernels(hidden, read)) is not None:
            return logits
        if read.simple:
            normal = self._normal(0, hidden[0], read.slots[0], modulator)
            return F.linear(normal, *self._matrix(0)) if self._has_matrix else normal
        total: Tensor | None = None
        for head in _heads_of(read):
            output, mean = self._output(head), self._mean(head, hidden, read, num_targets, modulator)
            if total is None:
                total = F.linear(mean, output.weight)
            else:
                sums = torch.addmm(total.flatten(0, 1), mean.flatten(0, 1), output.weight.t())
                total = sums.view_as(total)
            if output.bias is not None:
                total = total + shares(read, head, num_targets)[:, None] * output.bias
        assert total is not None
        return total

    def readout(self, hidden: Sequence[Tensor], read: Read, num_targets: int, modulator: Modulator | None) -> Readout:
        """What these logits are the product of; arguments as in :meth:`logits`."""
        if read.simple:
            return Readout(self._normal(0, hidden[0], read.slots[0], modulator), *self._matrix(0))
        heads = _heads_of(read)
        means = [self._mean(head, hidden, read, num_targets, modulator) for head in heads]
        return join_heads(means, [self._output(head) for head in heads], [shares(read, h, num_targets) for h in heads])

    def _by_kernels(self, hidden: Sequence[Tensor], read: Read) -> Tensor | None:
        """The logits in fewer kernels; None if they do not know these heads."""
        if not read.sources or not self._has_matrix:
            return None
        heads = [0] if read.simple else _heads_of(read)
        weights, biases = zip(*[self._matrix(head) for head in heads], strict=True)
        norms = [norm for norm in (self.norms[head] for head in heads) if isinstance(norm, RMSNorm)]
        if len(norms) < len(heads) or any(bias is not None for bias in biases):
            return None
        if not fused.can_read(hidden[0], weights[0]):
            return None
        states, sources = [hidden[head] for head in heads], [read.sources[head] for head in heads]
        return fused.read(
            states, norms, weights, sources, None if read.simple else [read.shares[head] for head in heads]
        )

    @property
    def _has_matrix(self) -> bool:
        return self.tied is not None or len(self.outputs) > 0

    def _matrix(self, head: int) -> tuple[Tensor, Tensor | None]:
        """Weight [V, dim] and bias [V] of a head."""
        if self.tied is not None:
            return self.tied, None
        output = self._output(head)
        return output.weight, output.bias

    def _output(self, head: int) -> nn.Linear:
        output = self.outputs[head]
        assert isinstance(output, nn.Linear)
        return output

    def _mean(
        self, head: int, hidden: Sequence[Tensor], read: Read, num_targets: int, modulator: Modulator | None
    ) -> Tensor:
        """Share of a head in the mean over reads, in front of its matrix, [B, D, dim]: the mean commutes with it."""
        return weighted(self._normal(head, hidden[head], read.slots[head], modulator), read, head, num_targets)

    def _normal(self, head: int, state: Tensor, slots: Tensor, modulator: Modulator | None) -> Tensor:
        """What a head sees at slots int64 [n] or [B, n] of a hidden state [B, F, dim], [B, n, dim]."""
        if slots.dim() == 1:
            chosen = state[:, slots]
        else:
            chosen = state.gather(1, slots[..., None].expand(-1, -1, state.shape[-1]))
        normal = self.norms[head](chosen)
        if modulator is not None:
            shift, scale = self.modulations[head](modulator.select(slots))
            normal = normal * (1 + scale) + shift
        return normal


def _heads_of(read: Read) -> list[int]:
    return [head for head, slots in enumerate(read.slots) if slots.numel()]
