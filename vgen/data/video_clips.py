"""Clips cut out of videos when drawn: which windows, at which length and stride."""

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from vgen.data.source import Batch, DataSource, Draws, check_labels, resolve_classes, stratified_split
from vgen.data.video_index import VideoReader, index_videos
from vgen.data.video_reader import BrokenVideoError, VideoInfo, read_frames
from vgen.data.video_transforms import ClipTransform
from vgen.errors import UserError
from vgen.pixels import to_uint8
from vgen.random import keyed_uniform

if TYPE_CHECKING:
    from PIL.Image import Image

CHOICES = ("random", "uniform", "all")
SHORT = ("repeat", "drop")


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """What is common to all sets of videos; the keys of their configurations.

    Attributes:
        image_size: side of the square frames in pixels.
        num_frames: frames of a clip.
        stride: source frames from one frame of a clip to the next.
        crop: see :class:`vgen.data.video_transforms.ClipTransform`.
        flip: mirror training clips with probability 1/2.
        train_clips: ``random`` (one clip per video, a new window at every draw), ``uniform`` (``clips_per_video``
            windows, evenly spread; the central one if 1) or ``all`` (every window, without overlap; the tail is left
            out, as in LARP's evaluation).
        val_clips: likewise; ``random`` means the central window there.
        clips_per_video: of ``uniform``.
        short_videos: videos shorter than a clip: ``repeat`` their last frame or ``drop`` them.
        index_folder: where lengths of videos are remembered.
        seed: of windows, crops and mirroring.
    """

    image_size: int
    num_frames: int
    stride: int
    crop: str
    flip: bool
    train_clips: str
    val_clips: str
    clips_per_video: int
    short_videos: str
    index_folder: str
    seed: int

    def __post_init__(self) -> None:
        for key, value in (("train_clips", self.train_clips), ("val_clips", self.val_clips)):
            if value not in CHOICES:
                raise UserError(f"data.{key}={value} is unknown; choose one of {', '.join(CHOICES)}")
        for key, number in (
            ("num_frames", self.num_frames),
            ("stride", self.stride),
            ("clips_per_video", self.clips_per_video),
        ):
            if number < 1:
                raise UserError(f"data.{key}={number} must be at least 1")
        if self.short_videos not in SHORT:
            raise UserError(f"data.short_videos={self.short_videos} is unknown; choose one of {', '.join(SHORT)}")

    @property
    def span(self) -> int:
        """Source frames that a clip covers."""
        return (self.num_frames - 1) * self.stride + 1

    def starts(self, choice: str, frames: int) -> list[int]:
        """First frames of the fixed windows of a video of that many frames."""
        room = max(0, frames - self.span)
        if choice == "all":
            return list(range(0, room + 1, self.span))
        if choice == "uniform" and self.clips_per_video > 1:
            return [round(room * number / (self.clips_per_video - 1)) for number in range(self.clips_per_video)]
        return [room // 2]


@dataclass(frozen=True, kw_only=True)
class VideoClips:
    """Clips decoded when drawn; fulfils :class:`vgen.data.source.VideoDataset`.

    A clip that turns out unreadable is replaced by the next readable one of the set and named in ``broken``, so that
    batches keep their shape.

    Attributes:
        reader: the videos.
        frames: int64 [videos of the reader], their lengths.
        videos: int64 [n], video of each clip.
        starts: int64 [n], first frame of each clip.
        labels: int64 [n].
        options: length, stride and the rest.
        wander: a new window at every draw.
        augment: crops and mirroring are drawn.
        broken: names of videos left out.
    """

    reader: VideoReader
    frames: Tensor
    videos: Tensor
    starts: Tensor
    labels: Tensor
    options: ClipOptions
    wander: bool
    augment: bool
    broken: tuple[str, ...] = ()

    @property
    def image_size(self) -> int:
        """Side of the square frames in pixels."""
        return self.options.image_size

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        return self.options.num_frames

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """One clip without augmentation: pixels float32 [3, T, S, S] in [-1, 1], label and index int64 scalars."""
        clip, used, _ = self._readable(index, None)
        return {"pixels": clip, "label": self.labels[used], "index": torch.tensor(used)}

    def __getitems__(self, draws: Draws) -> Batch:
        """A batch: pixels float32 [B, 3, T, S, S], label int64 [B], index int64 [B]."""
        clips, used, broken = [], [], []
        for wanted, draw in draws:
            state = int(keyed_uniform(self.options.seed, draw) * 2.0**48)
            clip, readable, skipped = self._readable(wanted, random.Random(state))
            clips.append(clip)
            used.append(readable)
            broken += skipped
        index = torch.tensor(used, dtype=torch.int64)
        return {"pixels": torch.stack(clips), "label": self.labels[index], "index": index, "broken": broken}

    def _readable(self, index: int, rng: random.Random | None) -> tuple[Tensor, int, list[str]]:
        """The clip at ``index`` or the next readable one, its index, and the names of those skipped."""
        skipped: list[str] = []
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            try:
                return self._clip(candidate, rng), candidate, skipped
            except BrokenVideoError as error:
                skipped.append(str(error))
        raise UserError(f"none of the {len(self)} clips can be read (first: {skipped[0]}); check data.path")

    def _numbers(self, index: int, rng: random.Random | None) -> list[int]:
        """Frame numbers of a clip; beyond the end of a short video its last frame is repeated."""
        length, span = int(self.frames[self.videos[index]]), self.options.span
        start = int(self.starts[index])
        if self.wander and rng is not None:
            start = rng.randrange(max(0, length - span) + 1)
        return [min(start + step, length - 1) for step in range(0, span, self.options.stride)]

    def _source(self, index: int, numbers: list[int]) -> Tensor:
        """Frames uint8 [n, H, W, 3] of the video of a clip."""
        video = int(self.videos[index])
        name = self.reader.name(video)
        try:
            return read_frames(self.reader.open(video), numbers, name)
        except OSError as error:
            raise BrokenVideoError(f"{name} ({error.strerror or error})") from error

    def _clip(self, index: int, rng: random.Random | None) -> Tensor:
        options = self.options
        frames = self._source(index, self._numbers(index, rng))
        transform = ClipTransform(image_size=options.image_size, crop=options.crop, flip=options.flip)
        return transform(frames, rng if self.augment else None) * 2 - 1

    def picture(self, index: int) -> Tensor:
        """The clip in its fixed window and crop, rounded to uint8 [3, T, S, S].

        Raises:
            BrokenVideoError: if it cannot be read.
        """
        return to_uint8(self._clip(index, None))

    def raw(self, index: int) -> "Image":
        """The first frame before any crop, as RGB image; raises like :meth:`picture`."""
        from PIL import Image

        return Image.fromarray(self._source(index, self._numbers(index, None)[:1])[0].numpy())

    def name(self, index: int) -> str:
        """The name of a clip in messages."""
        return f"{self.reader.name(int(self.videos[index]))} from frame {int(self.starts[index])}"

    def subset(self, indices: Tensor) -> Self:
        """The clips at ``indices`` (int64 [m])."""
        return replace(self, videos=self.videos[indices], starts=self.starts[indices], labels=self.labels[indices])

    def without_augmentation(self) -> Self:
        """The same clips in their fixed windows, centrally cropped, never mirrored."""
        return replace(self, wander=False, augment=False)

    def fingerprint(self) -> str:
        """Hash of names, windows, labels and of what shapes a clip."""
        options = self.options
        shape = (options.image_size, options.num_frames, options.stride, options.crop)
        digest = hashlib.sha256(f"{self.reader.fingerprint()} {shape}".encode())
        for tensor in (self.videos, self.starts, self.labels):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def video_source(
    *,
    name: str,
    where: str | Path,
    train: tuple[VideoReader, Tensor],
    val: tuple[VideoReader, Tensor] | None,
    num_classes: int | None,
    class_names: Iterable[str] | None,
    val_fraction: float,
    options: ClipOptions,
) -> DataSource:
    """Make a data source of videos; the part that folders, lists and shards share.

    Args:
        name: of the data.
        where: folder named in messages.
        train: videos and their labels (int64 [n]).
        val: likewise, or None to set ``val_fraction`` of the training videos aside.
        num_classes: or None to take it from the names or labels.
        class_names: or None.
        val_fraction: used where there is no validation split.
        options: length, stride and the rest.

    Raises:
        UserError: for labels out of range, contradictory options, or if no video is readable.
    """
    ClipTransform(image_size=options.image_size, crop=options.crop, flip=options.flip)
    found = 1 + max(int(labels.max()) for _, labels in filter(None, (train, val)))
    count, names = resolve_classes(num_classes, class_names, found, where=where)
    for _, labels in filter(None, (train, val)):
        check_labels(labels, count, where=where)
    infos = index_videos(train[0], options.index_folder)
    if val is None:
        kept, held_out = stratified_split(train[1], val_fraction, options.seed)
        val = train
        parts = [(infos, kept), (infos, held_out)]
    else:
        parts = [
            (infos, torch.arange(len(train[1]))),
            (index_videos(val[0], options.index_folder), torch.arange(len(val[1]))),
        ]
    choices = (options.train_clips, options.val_clips)
    sets = [
        _cut(*split, *part, choice, options, where)
        for split, part, choice in zip((train, val), parts, choices, strict=True)
    ]
    rates = sorted(fact.fps for fact in infos if not isinstance(fact, str) and fact.fps > 0)
    fps = rates[len(rates) // 2] / options.stride if rates else None
    return DataSource(name, sets[0], sets[1].without_augmentation(), count, names, options.image_size, fps=fps)


def _cut(
    reader: VideoReader,
    labels: Tensor,
    facts: list[VideoInfo | str],
    members: Tensor,
    choice: str,
    options: ClipOptions,
    where: str | Path,
) -> VideoClips:
    """The clips of the readable videos among ``members`` (int64 [m])."""
    windows: list[tuple[int, int]] = []
    broken = []
    for video in members.tolist():
        fact = facts[video]
        if isinstance(fact, str):
            broken.append(fact)
        elif fact.frames < options.span and (options.short_videos == "drop" or choice == "all"):
            broken.append(f"{reader.name(video)} ({fact.frames} frames, a clip covers {options.span})")
        else:
            windows += [(video, start) for start in options.starts(choice, fact.frames)]
    if not windows:
        raise UserError(
            f"{where}: none of the {len(members)} videos gives a clip (first: {broken[0]}); check data.path, "
            "data.num_frames and data.stride"
        )
    videos, starts = torch.tensor(windows).unbind(1)
    return VideoClips(
        reader=reader,
        frames=torch.tensor([0 if isinstance(fact, str) else fact.frames for fact in facts]),
        videos=videos,
        starts=starts,
        labels=labels[videos],
        options=options,
        wander=choice == "random",
        augment=True,
        broken=tuple(broken),
    )
