"""Kernels that come before the one in front of them has ended (programmatic dependent launch)."""

from functools import cache

import torch


def early_launch(device: torch.device, wanted: bool = True) -> dict[str, bool]:
    """Options of a Triton kernel with a constant ``EARLY``, launched so where the device can.

    Such a kernel may be there before several in front of it are done. Until it has waited for the last of them it may
    read only what was there when the last plain kernel was launched, or before the last that lets none follow until it
    has waited itself. Every decoding pass draws its tokens by one or the other: by PyTorch, or beginning with
    :func:`vgen.sampling.draw_kernels.weigh_chunks`.
    """
    early = wanted and _comes_early(device)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@cache
def _comes_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
