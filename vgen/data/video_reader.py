"""Frames out of video files with PyAV, exact by frame number whatever the codec."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen.data.broken import BrokenImageError
from vgen.media import require_av

SEEK_FROM = 48  # frames; decoding so many from the start is faster than finding a place to seek to
VideoFile = Path | io.BytesIO


class BrokenVideoError(BrokenImageError):
    """A video that cannot be decoded; the message is its name and the reason."""


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video before it is decoded.

    Attributes:
        frames: number of frames.
        fps: average frames per second, 0 where the file does not say.
        width: in pixels.
        height: in pixels.
    """

    frames: int
    fps: float
    width: int
    height: int


def probe(video: VideoFile, name: str) -> VideoInfo:
    """Number of frames and size of a video.

    Frames are counted from the file's own statement, else from its packets' times, else by decoding.

    Args:
        video: file or its bytes.
        name: for messages.

    Raises:
        BrokenVideoError: if it holds no readable video.
    """
    with _opened(video, name) as (container, stream):
        rate = float(stream.average_rate or 0)
        width, height, frames = stream.width, stream.height, stream.frames
        # Opening reads the header only; one decoded frame shows that the codec is known and the data are there.
        if next(container.decode(stream), None) is None:
            raise BrokenVideoError(f"{name} (no frames)")
    if not frames:
        times = _times(video, name)
        frames = len(times) if times else sum(1 for _ in _decoded(video, name))
    return VideoInfo(frames, rate, width, height)


def read_frames(video: VideoFile, indices: Sequence[int], name: str) -> Tensor:
    """Decode frames by number, counted in the order in which they are shown.

    Args:
        video: file or its bytes.
        indices: frame numbers in rising order; repeated numbers give repeated frames.
        name: for messages.

    Returns:
        uint8 [n, H, W, 3].

    Raises:
        BrokenVideoError: if a frame cannot be decoded.
    """
    wanted = sorted(set(indices))
    found: dict[int, Tensor] = {}
    if wanted[0] >= SEEK_FROM and (times := _times(video, name)) is not None and wanted[-1] < len(times):
        found = _by_time(video, [times[index] for index in wanted], wanted, name)
    if len(found) < len(wanted):
        found = _by_count(video, wanted, name)
    if len(found) < len(wanted):
        raise BrokenVideoError(f"{name} (ends before frame {wanted[-1]})")
    return torch.stack([found[index] for index in indices])


def _by_count(video: VideoFile, wanted: list[int], name: str) -> dict[int, Tensor]:
    """Decode from the start."""
    chosen = set(wanted)
    found = {}
    for number, frame in enumerate(_decoded(video, name)):
        if number in chosen:
            found[number] = _rgb(frame)
        if number == wanted[-1]:
            break
    return found


def _by_time(video: VideoFile, times: list[int], wanted: list[int], name: str) -> dict[int, Tensor]:
    """Seek to the key frame before the first wanted time and decode from there; frames not met are left out."""
    number_at = dict(zip(times, wanted, strict=True))
    found = {}
    for frame in _decoded(video, name, start=times[0]):
        if frame.pts in number_at:
            found[number_at[frame.pts]] = _rgb(frame)
        if frame.pts is not None and frame.pts >= times[-1]:
            break
    return found


def _times(video: VideoFile, name: str) -> list[int] | None:
    """Times of all frames in the order shown, read without decoding; None where the file leaves times out."""
    with _opened(video, name) as (container, stream):
        times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
    distinct = {time for time in times if time is not None}
    return sorted(distinct) if len(distinct) == len(times) else None


def _decoded(video: VideoFile, name: str, start: int | None = None) -> Iterator[Any]:
    with _opened(video, name) as (container, stream):
        if start is not None:
            container.seek(start, stream=stream, backward=True)
        yield from container.decode(stream)


def _rgb(frame: Any) -> Tensor:
    return torch.from_numpy(frame.to_ndarray(format="rgb24"))


@contextmanager
def _opened(video: VideoFile, name: str) -> Iterator[tuple[Any, Any]]:
    """A container of its own for every call, because open ones do not survive the fork of a worker."""
    av = require_av()
    if isinstance(video, io.BytesIO):
        video.seek(0)
    try:
        with av.open(video if isinstance(video, io.BytesIO) else str(video)) as container:
            if not container.streams.video:
                raise BrokenVideoError(f"{name} (no video stream)")
            stream = container.streams.video[0]
            if torch.utils.data.get_worker_info() is None:
                stream.thread_type = "AUTO"
            yield container, stream
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise BrokenVideoError(f"{name} ({reason})") from error
