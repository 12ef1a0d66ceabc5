"""Weights of the golden cases that are too large to store: a documented integer hash of name, index and seed."""

import ast
import math
import re
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_MASK = np.uint64(0xFFFFFFFF)
_STRIDE = 0x9E3779B1


def fill(name: str, shape: tuple[int, ...], seed: int, low: float, high: float) -> Tensor:
    """Float32 tensor, uniform in [low, high), keyed by a name and a seed."""
    salt = np.uint64((zlib.crc32(name.encode()) ^ (seed * _STRIDE)) & 0xFFFFFFFF)
    h = (np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(_STRIDE) + salt) & _MASK
    h ^= h >> np.uint64(16)
    h = (h * np.uint64(0x85EBCA6B)) & _MASK
    h ^= h >> np.uint64(13)
    h = (h * np.uint64(0xC2B2AE35)) & _MASK
    h ^= h >> np.uint64(16)
    uniform = (h.astype(np.float64) + 0.5) / 4294967296.0
    return torch.from_numpy((low + (high - low) * uniform).astype(np.float32)).reshape(shape)


def default_rule(
    name: str,
    shape: tuple[int, ...],
    seed: int,
    *,
    gain: float = 1.0,
    overrides: Mapping[str, tuple[float, float]] | None = None,
) -> Tensor:
    """One state dict entry: an override by suffix, else by rank (scales, biases, fan-in-scaled matrices)."""
    for suffix, (low, high) in (overrides or {}).items():
        if name.endswith(suffix):
            return fill(name, shape, seed, low, high)
    if len(shape) <= 1:
        low, high = (0.9, 1.1) if name.endswith("weight") else (-0.05, 0.05)
        return fill(name, shape, seed, low, high)
    bound = gain * math.sqrt(3.0 / math.prod(shape[1:]))
    return fill(name, shape, seed, -bound, bound)


def parse_rule(text: str) -> tuple[float, dict[str, tuple[float, float]]]:
    """Gain and overrides out of the sentence in which a case describes its default_rule."""
    gain = 1.0
    match = re.search(r"gain\s*=\s*(sqrt\()?([0-9.]+)", text)
    if match:
        gain = math.sqrt(float(match[2])) if match[1] else float(match[2].rstrip("."))
    match = re.search(r"overrides\s*=\s*(\{.*?\})", text)
    return gain, ast.literal_eval(match[1]) if match else {}
