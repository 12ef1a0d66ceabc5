"""Clips to files a person can watch: MP4, GIF, single frames, and contact sheets.

For viewing only: MP4 and GIF lose information, so nothing is ever measured on them.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from vgen.errors import UserError
from vgen.pixels import save_grid

INSTALL = 'pip install "vgen[video]" (or: pip install av)'
_GAP = 2  # pixels between tiles
_FASTEST_GIF = 50.0  # frames per second; browsers slow down anything shorter than 20 ms


def require_av() -> ModuleType:
    """PyAV, which reads and writes video files.

    Raises:
        UserError: with the line that installs it.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(f"video files need PyAV, which is not installed; {INSTALL}") from error
    return av


def save_mp4(clip: Tensor, path: str | Path, *, fps: float) -> Path:
    """Write a clip as H.264 MP4 that plays everywhere (MPEG-4 part 2, with a note, where the encoder is missing).

    Args:
        clip: uint8 [3, T, H, W]; odd sides gain a copy of their last row or column, as the format wants even ones.
        path: file to write; it appears only when complete.
        fps: frames per second.

    Returns:
        The path written.

    Raises:
        UserError: without PyAV, for fps that are not positive, or if the file cannot be written.
    """
    av = require_av()
    frames = _frames(clip, fps)
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        planes = F.pad(frames.permute(0, 3, 1, 2).float(), (0, width % 2, 0, height % 2), mode="replicate")
        frames = planes.to(torch.uint8).permute(0, 2, 3, 1)
    codec, options = "libx264", {"crf": "17", "preset": "medium"}
    if codec not in av.codecs_available:
        codec, options = "mpeg4", {"qscale": "2"}
        print(f"note: this PyAV has no H.264 encoder, {path} is MPEG-4 part 2", file=sys.stderr)
    with _complete(path) as partial, av.open(partial, "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames.contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return Path(path)


def save_gif(clip: Tensor, path: str | Path, *, fps: float) -> Path:
    """Write a clip as an endless GIF.

    GIF times are multiples of 10 ms; each frame is timed so that the clip as a whole keeps its length. Equal frames in
    a row are stored once with their joint time.

    Args:
        clip: uint8 [3, T, H, W].
        path: file to write; it appears only when complete.
        fps: frames per second, at most 50.

    Returns:
        The path written.

    Raises:
        UserError: for fps out of range, or if the file cannot be written.
    """
    from PIL import Image

    if fps > _FASTEST_GIF:
        raise UserError(f"fps={fps} is too fast for a GIF (at most {_FASTEST_GIF:.0f}); write an MP4 or lower fps")
    pictures = [Image.fromarray(frame) for frame in _frames(clip, fps).contiguous().numpy()]
    ends = [round(100 * number / fps) for number in range(len(pictures) + 1)]
    times = [10 * (end - start) for start, end in pairwise(ends)]
    with _complete(path) as partial:
        pictures[0].save(partial, format="GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
    return Path(path)


def save_frames(clip: Tensor, folder: str | Path) -> list[Path]:
    """Write the frames of a clip uint8 [3, T, H, W] as ``folder/frame-0000.png`` and on, without loss.

    Raises:
        UserError: if a file cannot be written.
    """
    from PIL import Image

    paths = []
    for number, frame in enumerate(_frames(clip, 1.0).contiguous().numpy()):
        path = Path(folder) / f"frame-{number:04d}.png"
        with _complete(path) as partial:
            Image.fromarray(frame).save(partial, format="PNG")
        paths.append(path)
    return paths


def strips(clips: Tensor, *, most: int = 16) -> tuple[Tensor, int]:
    """Frames of clips as grid cells, one clip per row.

    Args:
        clips: uint8 [B, 3, T, H, W].
        most: frames shown per clip, evenly spread with first and last among them.

    Returns:
        uint8 [B * columns, 3, H, W] and the number of columns.
    """
    count = clips.shape[2]
    shown = torch.arange(count) if count <= most else torch.linspace(0, count - 1, most).round().long()
    return clips[:, :, shown].transpose(1, 2).flatten(0, 1), len(shown)


def contact_sheet(clips: Tensor, path: str | Path, *, frames: int = 8, scale: int = 1) -> Path:
    """Write clips as one PNG: a row per clip, its frames from left to right.

    Args:
        clips: uint8 [B, 3, T, H, W].
        path: file to write; its folder is made if needed.
        frames: frames per clip at most, evenly spread.
        scale: integer magnification.
    """
    cells, columns = strips(clips, most=frames)
    return save_grid(cells, path, columns=columns, scale=scale)


def tiled(clips: Tensor, *, columns: int) -> Tensor:
    """Clips side by side in one clip.

    Args:
        clips: uint8 [B, 3, T, H, W].
        columns: clips per row.

    Returns:
        uint8 [3, T, rows * (H + gap) + gap, columns * (W + gap) + gap], white between the clips and black where the
        last row is not full.
    """
    count, _, frames, height, width = clips.shape
    rows = -(-count // columns)
    full = torch.cat([clips, clips.new_zeros(rows * columns - count, *clips.shape[1:])])
    cells = F.pad(full, (_GAP, 0, _GAP, 0), value=255).unflatten(0, (rows, columns))
    sheet = cells.permute(2, 3, 0, 4, 1, 5).reshape(3, frames, rows * (height + _GAP), columns * (width + _GAP))
    return F.pad(sheet, (0, _GAP, 0, _GAP), value=255)


def _frames(clip: Tensor, fps: float) -> Tensor:
    """A clip uint8 [3, T, H, W] as uint8 [T, H, W, 3] on the CPU."""
    assert clip.dtype == torch.uint8, clip.dtype
    assert clip.dim() == 4, clip.shape
    assert clip.shape[0] == 3, clip.shape
    if not fps > 0:
        raise UserError(f"fps={fps} must be a positive number of frames per second")
    if clip.shape[1] == 0:
        raise UserError("a clip without frames cannot be written")
    return clip.permute(1, 2, 3, 0).cpu()


@contextmanager
def _complete(path: str | Path) -> Iterator[str]:
    """A name to write under; the file gets its own name only if all went well, and nothing is left behind otherwise."""
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield str(partial)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error
    finally:
        with suppress(OSError):
            partial.unlink()
