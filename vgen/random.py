"""Counter-based random numbers: a value depends only on its keys, never on batch size, process or call order."""

import math

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def _mix(x: Tensor | int) -> Tensor | int:
    """One round of a 32-bit integer finaliser, kept in int64 so that it runs alike on every device."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK32
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK32
    return x ^ (x >> 16)


def keyed_uniform(*keys: Tensor | int) -> Tensor:
    """Uniform numbers in [0, 1) keyed by integers.

    Args:
        keys: non-negative integers or int64 tensors (below 2**62) that broadcast against each other, for example
            (seed, sample index [B, 1], position [N]). Equal keys give equal numbers on every device.

    Returns:
        float64 tensor of the broadcast shape with 48 random bits.
    """
    tensors = [k for k in keys if isinstance(k, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    # Plain integers are mixed on the host: no copy to the device, which a CUDA graph could not hold.
    high: Tensor | int = 0x243F6A88
    low: Tensor | int = 0x85A308D3
    for key in keys:
        if isinstance(key, Tensor):
            key = key.to(device, torch.int64)
        high = _mix((high + (key & _MASK32) + 0x9E3779B9) & _MASK32)
        low = _mix((low ^ high) + (key >> 32) & _MASK32)
        high = _mix((high + low * 0x9E3779B1) & _MASK32)
    return torch.as_tensor(high * 65536 + (low >> 16)).double() / 2.0**48


def keyed_permutation(length: int, *keys: int) -> Tensor:
    """A random permutation of 0..length-1 (int64 [length]) keyed by integers."""
    return keyed_uniform(*keys, torch.arange(length)).argsort()


def keyed_normal(*keys: Tensor | int) -> Tensor:
    """Standard normal numbers keyed by integers (Box-Muller on two uniform numbers).

    Args:
        keys: as in :func:`keyed_uniform`.

    Returns:
        float32 tensor of the broadcast shape.
    """
    dims = max((key.dim() for key in keys if isinstance(key, Tensor)), default=0)
    device = next((key.device for key in keys if isinstance(key, Tensor)), None)
    # Both numbers in one call: mixing what their keys share twice would double the kernels of a training step.
    pair = torch.arange(2, device=device).view(2, *[1] * dims)
    first, second = keyed_uniform(*keys, pair)
    radius = (-2.0 * torch.log1p(-first)).sqrt()
    return (radius * torch.cos(2.0 * math.pi * second)).float()
