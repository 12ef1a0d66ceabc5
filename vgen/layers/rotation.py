"""Projections cut into rotated queries, rotated keys and values in one kernel, their gradients joined in another."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vgen.layers.many_rows import join_rotated, rotate_many


def split_and_rotate(projected: Tensor, rope: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, heads, F, head_dim], keys and values [B, kv_heads, F, head_dim]; differentiable by ``projected``.

    The same numbers as :func:`vgen.layers.rope.rotate`, but for roundings of float32. Needs what
    :func:`vgen.layers.availability.why_not` asks for.

    Args:
        projected: [B, F, (heads + 2 kv_heads) * head_dim].
        rope: float32 [F, head_dim / 2, 2] or [B, F, head_dim / 2, 2].
        heads: query heads.
        kv_heads: key-value heads.
    """
    query, key, value = _split(projected, rope, heads, kv_heads)
    return query.transpose(1, 2), key, value


@torch.library.custom_op("vgen::split_and_rotate", mutates_args=())
def _split(projected: Tensor, rope: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _empty(projected, heads, kv_heads)
    # Keys and values are written as to a cache of just these slots.
    rotate_many(projected.contiguous(), *outputs, rope, _slots(projected.shape[1], projected.device))
    return outputs


@_split.register_fake
def _(projected: Tensor, rope: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(projected, heads, kv_heads)


@torch.library.custom_op("vgen::join_rotated", mutates_args=())
def _join(query: Tensor, key: Tensor, value: Tensor, rope: Tensor) -> Tensor:
    return join_rotated(query, key, value, rope)


@_join.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, rope: Tensor) -> Tensor:
    batch, heads, fed, head_dim = query.shape
    return query.new_empty(batch, fed, (heads + 2 * key.shape[1]) * head_dim)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None, None, None]:
    (rope,) = ctx.saved_tensors
    return _join(query.transpose(1, 2), key, value, rope), None, None, None


_split.register_autograd(_backward, setup_context=_keep)


def _empty(projected: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, fed, width = projected.shape
    head_dim = width // (heads + 2 * kv_heads)
    key, value = (projected.new_empty(batch, kv_heads, fed, head_dim) for _ in range(2))
    return projected.new_empty(batch, fed, heads, head_dim), key, value


@lru_cache(maxsize=8)
def _slots(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)
