"""Whether a device runs the Triton kernels."""

from functools import cache
from importlib.util import find_spec

import torch

from vgen.errors import UserError
from vgen.layers.interpreter import interpreted


@cache
def why_not(device: torch.device) -> str | None:
    """What is missing on a device to run the kernels; None = nothing."""
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"its kernels need a CUDA device and this one is {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"its kernels need a GPU of compute capability 8.0 or newer, not {torch.cuda.get_device_name(device)}"
    return None


def check_available(device: torch.device) -> None:
    """Refuse a device without the kernels.

    Raises:
        UserError: saying what is missing.
    """
    if reason := why_not(device):
        raise UserError(f"engine=fused is not available: {reason}; use engine=auto")
