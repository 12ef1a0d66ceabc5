"""How the centre of mass of a clip moves, and whether it moves as a digit does that bounces off the edges."""

import torch
from torch import Tensor

FLOOR = 0.2
"""Grey value below which a pixel has no mass: background noise of a decoder must not pull the centre."""
TOLERANCE = 1.5
"""Pixels. Places are whole pixels, so that the steps of a steady motion differ by up to 1 from each other."""
BOUNCES = 3
"""Reflections that an axis may see; 17 frames at 5 pixels in a room of 36 see two or three."""


def centres(clips: Tensor) -> Tensor:
    """Centre of mass of every frame, float32 [B, T, 2] (row, column) in pixels; the middle of an empty frame.

    Args:
        clips: uint8 [B, 3, T, H, W].
    """
    grey = clips.float().mean(1) / 255
    mass = (grey - FLOOR).clamp(min=0)
    height, width = mass.shape[2:]
    total = mass.sum((2, 3)).clamp(min=1e-6)
    rows = (mass.sum(3) * torch.arange(height, device=mass.device)).sum(2) / total
    columns = (mass.sum(2) * torch.arange(width, device=mass.device)).sum(2) / total
    empty = mass.amax((2, 3)) == 0
    middle = torch.tensor([(height - 1) / 2, (width - 1) / 2], device=mass.device)
    return torch.where(empty[..., None], middle, torch.stack([rows, columns], -1))


def moves_steadily(clips: Tensor, *, speed: tuple[float, float]) -> Tensor:
    """Which clips move with piecewise constant velocity, bool [B].

    On each axis alone, with the length of a step between two frames and its median over the clip: no step is longer
    than the median by more than TOLERANCE (a jump), at most BOUNCES are shorter by more than that (a bounce cuts a step
    short), the direction of steps longer than TOLERANCE changes at most BOUNCES times. The two medians together are a
    speed of the data, within TOLERANCE (a digit that stands still does not pass). No frame has less than half or more
    than twice the median mass of its clip (a digit that vanishes does not pass).

    Args:
        clips: uint8 [B, 3, T, H, W].
        speed: slowest and fastest motion of the data, pixels per frame.
    """
    steps = centres(clips).diff(dim=1)
    length = steps.abs()
    median = length.median(1, keepdim=True).values
    jumps = (length > median + TOLERANCE).any(1)
    cut = (length < median - TOLERANCE).sum(1) > BOUNCES
    turns = torch.stack([_turns(steps[..., axis]) for axis in range(2)], -1) > BOUNCES
    mean_speed = median[:, 0].norm(dim=-1)
    right_speed = (mean_speed >= speed[0] - TOLERANCE) & (mean_speed <= speed[1] + TOLERANCE)
    mass = (clips.float().mean(1) / 255 - FLOOR).clamp(min=0).sum((2, 3))
    usual = mass.median(1, keepdim=True).values
    whole = ((mass >= usual / 2) & (mass <= usual * 2)).all(1) & (usual[:, 0] > 0)
    return ~(jumps | cut | turns).any(-1) & right_speed & whole


def _turns(steps: Tensor) -> Tensor:
    """Changes of direction among the clear steps of an axis, int64 [B], for steps [B, n]."""
    sign = torch.where(steps.abs() > TOLERANCE, steps.sign(), torch.zeros_like(steps))
    changes, last = torch.zeros(len(steps), dtype=torch.int64, device=steps.device), sign[:, 0]
    for now in sign[:, 1:].unbind(1):
        changes += now * last < 0
        last = torch.where(now == 0, last, now)
    return changes
