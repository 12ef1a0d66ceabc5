"""Weights of the golden cases of evaluation networks: splitmix64 of key, element index and salt."""

import math
import zlib

import numpy as np
import torch
from torch import Tensor


def hashed_weight(key: str, shape: tuple[int, ...], salt: int = 0) -> Tensor:
    """One state dict entry by the rule the cases document; int64 for ``num_batches_tracked``."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    count = math.prod(shape)
    seed = np.uint64((zlib.crc32(key.encode()) + salt * 0x100000001) & 0xFFFFFFFFFFFFFFFF)
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    u = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    if key.endswith("running_mean"):
        value = 0.2 * (2 * u - 1)
    elif key.endswith("running_var"):
        value = 0.5 + u
    elif key.endswith("bias"):
        value = 0.1 * (2 * u - 1)
    elif len(shape) == 1:
        value = 0.8 + 0.4 * u
    else:
        value = math.sqrt(6 / math.prod(shape[1:])) * (2 * u - 1)
    return torch.from_numpy(value.astype(np.float32)).reshape(shape)


def hashed_state(like: dict[str, Tensor], salt: int = 0) -> dict[str, Tensor]:
    """A state dict with the names and shapes of another one."""
    return {key: hashed_weight(key, tuple(value.shape), salt) for key, value in like.items()}
