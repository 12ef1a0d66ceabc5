"""Frames of video files through PyAV, exact by decode order."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgen.errors import UserError


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Container and video stream; PyAV's errors become ours."""
    try:
        import av
    except ImportError as error:
        raise UserError('reading video files needs PyAV; install it with: pip install "vgen[video]"') from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video stream; replace or remove it")
            yield container, container.streams.video[0]
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path} cannot be read as a video ({error}); replace or remove it") from error


def count_frames(path: Path) -> int:
    """Number of frames: as the file states, or counted where it does not state any (avi, mkv).

    Raises:
        UserError: naming a file that cannot be read.
    """
    with _opened(path) as (container, stream):
        return int(stream.frames) or sum(packet.size > 0 for packet in container.demux(stream))


def read_frames(path: Path, index: Sequence[int]) -> Tensor:
    """Frames uint8 [T, 3, H, W] by their place in decode order, which is right for variable frame rates too.

    Args:
        path: video file.
        index: increasing frame numbers.

    Raises:
        UserError: naming a file that cannot be read or ends too early.
    """
    wanted = set(index)
    found: dict[int, np.ndarray] = {}
    with _opened(path) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24")
            if number >= max(wanted):
                break
    missing = sorted(wanted - found.keys())
    if missing:
        raise UserError(f"{path} ends before frame {missing[0]} (counted from 0); replace or remove it")
    return torch.from_numpy(np.stack([found[i] for i in index])).permute(0, 3, 1, 2)
