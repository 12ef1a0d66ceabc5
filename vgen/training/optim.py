"""Optimizers with sensible decay groups, frozen parts and learning-rate curves counted in optimizer steps."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vgen.errors import UserError

_SHAPES = ("constant", "cosine", "linear", "multistep")


def freeze_others(network: nn.Module, prefixes: Sequence[str]) -> None:
    """Train only the parameters whose names begin with one of the prefixes.

    Raises:
        UserError: if a prefix is no beginning of any name.
    """
    names = [name for name, _ in network.named_parameters()]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise UserError(f"task.train_only: no parameter begins with {prefix}; the network's parts are {parts}")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(prefixes)))


def decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    matrices: Collection[str],
) -> list[dict]:
    """Parameter groups with decay on matrices only.

    Args:
        named_parameters: trainable parameters by name.
        weight_decay: decay of the first group.
        matrices: names of the tensors with two or more dimensions (embeddings and convolutions included). They are
            given by name because sharded training flattens parameters before optimizers are built.

    Returns:
        One group with and one without decay, without empty groups.
    """
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if name in matrices], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in matrices], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def without_decay(matrices: Collection[str], words: Sequence[str]) -> set[str]:
    """Names of matrices that hold none of the words, for recipes that exempt embeddings and the like by name."""
    return {name for name in matrices if not any(word in name for word in words)}


def adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    matrices: Collection[str],
    *,
    lr: float,
    betas: Sequence[float],
    weight_decay: float,
    no_decay: Sequence[str] = (),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """AdamW with decoupled decay on matrices only, except those named by ``no_decay``; one fused kernel on CUDA."""
    groups = decay_groups(named_parameters, weight_decay, without_decay(matrices, no_decay))
    fused = groups[0]["params"][0].is_cuda
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)


def adam(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    matrices: Collection[str],
    *,
    lr: float,
    betas: Sequence[float],
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Adam without decay (LlamaGen's tokenizer)."""
    groups = decay_groups(named_parameters, 0.0, matrices)
    fused = groups[0]["params"][0].is_cuda
    return torch.optim.Adam(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)


@dataclass(frozen=True, kw_only=True)
class LrSchedule:
    """Learning rate as a fraction of its base value, a pure function of the optimizer step.

    The factor rises linearly over ``warmup`` steps (step 0 gets 1 / warmup, or 0 with ``from_zero``), then follows
    ``shape``:
    ``constant`` stays at 1; ``cosine`` and ``linear`` fall to ``end`` at step ``total``; ``multistep`` is multiplied by
    ``gamma`` at every milestone.

    Attributes:
        shape: constant, cosine, linear or multistep.
        warmup: steps of the linear rise, 0 for none.
        total: steps of the whole run.
        end: last factor of cosine and linear, in [0, 1].
        milestones: steps, increasing; only for multistep.
        gamma: factor per milestone; only for multistep.
        from_zero: start the rise at 0 (TiTok), where the first step changes nothing.
    """

    shape: str
    warmup: int
    total: int
    end: float = 0.0
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    from_zero: bool = False

    def __post_init__(self) -> None:
        if self.shape not in _SHAPES:
            raise UserError(f"lr_schedule.shape={self.shape} is unknown; choose one of {', '.join(_SHAPES)}")
        if self.milestones and self.shape != "multistep":
            raise UserError(f"lr_schedule.milestones has no effect with shape={self.shape}; use shape=multistep")
        if self.shape == "multistep" and list(self.milestones) != sorted(set(self.milestones)):
            raise UserError(f"lr_schedule.milestones={list(self.milestones)} must increase")
        if not 0 <= self.warmup <= self.total:
            raise UserError(f"lr_schedule.warmup={self.warmup} must lie between 0 and the run's {self.total} steps")
        if not 0.0 <= self.end <= 1.0:
            raise UserError(f"lr_schedule.end={self.end} must lie in [0, 1]")

    def factor(self, step: int) -> float:
        """Factor of optimizer step ``step``, counted from 0."""
        if step < self.warmup:
            return (step if self.from_zero else step + 1) / self.warmup
        if self.shape == "multistep":
            return self.gamma ** sum(step >= milestone for milestone in self.milestones)
        if self.shape == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        fall = progress if self.shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))
        return 1.0 - (1.0 - self.end) * fall
