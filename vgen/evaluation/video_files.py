"""Clips cut out of video files by a stated rule."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from vgen.data.video_reader import BrokenVideoError, probe, read_frames
from vgen.data.video_transforms import ClipTransform
from vgen.errors import UserError
from vgen.evaluation.pictures import Pictures, labels_of_folders, read_bytes
from vgen.pixels import to_uint8
from vgen.random import keyed_uniform
from vgen.runtime import track

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v")
Window = Literal["first", "center", "random", "tiles"]
Resize = Literal["crop", "stretch"]
Short = Literal["error", "drop", "repeat"]


@dataclass(frozen=True)
class ClipChoice:
    """Which frames of which video files are scored.

    Attributes:
        frames: of a clip.
        stride: source frames from one frame of a clip to the next.
        window: ``first`` frames, ``center`` frames, one ``random`` window per video, or ``tiles``: all windows that do
            not overlap.
        count: clips drawn without replacement out of all of them (Python's ``Random(seed).sample``, as LARP draws its
            10,000); null = all, in the order of the file names.
        seed: of ``random`` windows and of the draw.
        short: what happens to a video with fewer frames than a clip spans: ``error``, ``drop`` it, or ``repeat`` its
            last frame.
        size: side in pixels clips are brought to; null = as stored.
        resize: ``crop`` brings the short side to ``size`` and cuts out the centre, ``stretch`` ignores the aspect
            ratio; both bilinear with antialiasing (LARP's numbers), rounded to 8 bits.
    """

    frames: int
    stride: int = 1
    window: Window = "first"
    count: int | None = None
    seed: int = 0
    short: Short = "error"
    size: int | None = None
    resize: Resize = "crop"

    def __post_init__(self) -> None:
        for key, kinds in (("window", Window), ("short", Short), ("resize", Resize)):
            if getattr(self, key) not in get_args(kinds):
                names = ", ".join(get_args(kinds))
                raise UserError(f"evaluation.clips.{key}={getattr(self, key)} is unknown; choose one of {names}")
        for key in ("frames", "stride", "count", "size"):
            value = getattr(self, key)
            if value is None and key in ("count", "size"):
                continue
            if not isinstance(value, int) or value < 1:
                raise UserError(f"evaluation.clips.{key}={value} must be a whole number of at least 1")

    @property
    def span(self) -> int:
        """Source frames that a clip covers."""
        return (self.frames - 1) * self.stride + 1

    def of_samples(self) -> "ClipChoice":
        """The choice for generated clips, which are scored from their first frame on and none left out."""
        return replace(self, window="first", count=None, short="error", stride=1)

    def starts(self, length: int, video: int) -> list[int]:
        """First frames of the clips of a video with ``length`` frames, the ``video``-th of its set."""
        room = max(length - self.span, 0)
        if self.window == "tiles":
            return list(range(0, room + 1, self.span))
        if self.window == "random":
            return [int(keyed_uniform(self.seed, video) * (room + 1))]
        return [room // 2 if self.window == "center" else 0]


class VideoClips(Pictures):
    """Clips of video files, files sorted by path; labels come from sub-folders as those of pictures do.

    Raises:
        UserError: naming a file that cannot be read or is too short.
    """

    kind = "videos"

    def __init__(self, folder: Path, files: Sequence[Path], choice: ClipChoice, class_names: Sequence[str] = ()):
        self.name = str(folder)
        self.choice = choice
        self.frames = choice.frames
        self.dropped = 0
        self._clips: list[tuple[Path, int, int]] = []  # file, first frame, frames of the file
        kept: list[Path] = []
        for number, file in enumerate(track(files, "counting frames", total=len(files), unit="video")):
            length = _length(file)
            if length < choice.span and choice.short != "repeat":
                if choice.short == "error":
                    raise UserError(
                        f"{file} has {length} frames but a clip spans {choice.span}; remove it or set "
                        f"evaluation.clips.short=drop or repeat"
                    )
                self.dropped += 1
                continue
            starts = choice.starts(length, number)
            self._clips += [(file, start, length) for start in starts]
            kept += [file] * len(starts)
        if choice.count is not None:
            if choice.count > len(self._clips):
                raise UserError(
                    f"evaluation.clips.count={choice.count} clips were asked for but {folder} gives {len(self._clips)}"
                )
            chosen = random.Random(choice.seed).sample(range(len(self._clips)), choice.count)
            self._clips, kept = [self._clips[i] for i in chosen], [kept[i] for i in chosen]
        if not self._clips:
            raise UserError(f"{folder} holds no video of at least {choice.span} frames")
        self.labels = labels_of_folders((file.relative_to(folder).as_posix() for file in kept), class_names)

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._clips)

    def read(self, index: Sequence[int]) -> Tensor:
        """Clips uint8 [B, T, 3, H, W] of the given indices.

        Raises:
            UserError: naming a file that cannot be read or whose size differs from the others'.
        """
        clips: list[Tensor] = []
        for i in index:
            file, start, length = self._clips[i]
            places = [min(start + k * self.choice.stride, length - 1) for k in range(self.choice.frames)]
            clip = _read(file, places, self.choice)
            if clips and clip.shape != clips[0].shape:
                raise UserError(
                    f"{file} is {clip.shape[3]}x{clip.shape[2]} but others are "
                    f"{clips[0].shape[3]}x{clips[0].shape[2]}; set evaluation.clips.size"
                )
            clips.append(clip)
        return torch.stack(clips)

    def fingerprint(self) -> str:
        """Hash of the files and of the windows."""
        files = {file: hashlib.sha256(read_bytes(file)).hexdigest() for file in {clip[0] for clip in self._clips}}
        facts = [(files[file], start, length) for file, start, length in self._clips]
        return hashlib.sha256(f"{self.choice} {facts}".encode()).hexdigest()


def _read(file: Path, places: list[int], choice: ClipChoice) -> Tensor:
    """Frames uint8 [T, 3, H, W] of a file, brought to the size of a choice."""
    try:
        frames = read_frames(file, places, str(file))
    except BrokenVideoError as error:
        raise UserError(f"{error}: replace or remove the file") from error
    if choice.size is None:
        return frames.permute(0, 3, 1, 2)
    fit = ClipTransform(image_size=choice.size, crop="center" if choice.resize == "crop" else "none", flip=False)
    return to_uint8(fit(frames) * 2 - 1).transpose(0, 1)


def _length(file: Path) -> int:
    try:
        return probe(file, str(file)).frames
    except BrokenVideoError as error:
        raise UserError(f"{error}: replace or remove the file") from error
