"""First frames that a frame-prediction generator goes on from, of a data set or of a video file."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vgen.data.source import CodeSource, DataSource
from vgen.data.video_reader import BrokenVideoError, probe, read_frames
from vgen.data.video_transforms import ClipTransform
from vgen.errors import UserError
from vgen.pixels import to_uint8


class Start(ABC):
    """Where first frames come from.

    Attributes:
        paste: the true first frames replace the predicted ones in the samples. LARP and OmniTokenizer score what the
            model makes of them, without pasting.
    """

    paste: bool

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Labels are 0..num_classes-1; they only accompany the samples."""

    @abstractmethod
    def labels(self, count: int) -> Tensor:
        """Labels int64 [count] of the first samples."""

    @abstractmethod
    def frames(self, index: Tensor, *, count: int, size: int) -> Tensor:
        """First frames of samples.

        Args:
            index: int64 [B], sample indices.
            count: number of frames T.
            size: side of the square frames in pixels.

        Returns:
            uint8 [B, 3, T, size, size].

        Raises:
            UserError: if they cannot be read.
        """


@dataclass(frozen=True, eq=False)
class FromClips(Start):
    """Clips in memory, over and over.

    Attributes:
        clips: uint8 [n, 3, T, S, S].
        classes: int64 [n].
    """

    clips: Tensor
    classes: Tensor
    paste: bool = False

    @property
    def num_classes(self) -> int:
        """Largest label plus one."""
        return 1 + int(self.classes.max())

    def labels(self, count: int) -> Tensor:
        """Those of the clips."""
        return self.classes[torch.arange(count) % len(self.classes)]

    def frames(self, index: Tensor, *, count: int, size: int) -> Tensor:
        """First frames of clips ``index`` modulo their number."""
        assert self.clips.shape[-1] == size
        return self.clips[index % len(self.clips), :, :count]


@dataclass(frozen=True, eq=False)
class FromData(Start):
    """Clips of a data set: sample i goes on from clip i, from the first one again after the last.

    Attributes:
        data: the set; in a configuration null means the one the generator was trained on.
        split: ``val`` or ``train``.
    """

    data: DataSource
    split: Literal["train", "val"] = "val"
    paste: bool = False

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: for an unknown split or data that are no clips.
        """
        if self.split not in ("train", "val"):
            raise UserError(f"predict.split={self.split} must be train or val")
        if isinstance(self.data, CodeSource) or self.data.num_frames is None:
            raise UserError("predict.data must be clips; choose such data with data@predict.data=<name>")

    @property
    def num_classes(self) -> int:
        """Of the data."""
        return self.data.num_classes

    def labels(self, count: int) -> Tensor:
        """Those of the clips."""
        labels = getattr(self.data, self.split).labels
        return labels[torch.arange(count) % len(labels)]

    def frames(self, index: Tensor, *, count: int, size: int) -> Tensor:
        """First frames of the clips in their fixed windows and crops."""
        clips = getattr(self.data, self.split)
        if clips.image_size != size or clips.num_frames < count:
            raise UserError(
                f"predict.data has clips of {clips.num_frames} frames of {clips.image_size} pixels; the generator "
                f"needs {count} of {size}: set predict.data.image_size and predict.data.num_frames"
            )
        try:
            return torch.stack([clips.picture(int(i) % len(clips))[:, :count] for i in index])
        except BrokenVideoError as error:
            raise UserError(f"predict.data: {error} cannot be read; remove the file") from error


@dataclass(frozen=True)
class FromVideo(Start):
    """The same frames of one video file for every sample.

    Attributes:
        file: video or GIF; frames are cut to their central square and resized.
        start: first frame used.
        stride: frames of the file from one frame of the clip to the next.
    """

    file: str
    start: int = 0
    stride: int = 1
    paste: bool = False

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: for numbers out of range.
        """
        if self.start < 0 or self.stride < 1:
            raise UserError(f"predict: start={self.start} must be at least 0 and stride={self.stride} at least 1")

    @property
    def num_classes(self) -> int:
        """One."""
        return 1

    def labels(self, count: int) -> Tensor:
        """All 0."""
        return torch.zeros(count, dtype=torch.int64)

    def frames(self, index: Tensor, *, count: int, size: int) -> Tensor:
        """The frames, once per sample."""
        wanted = [self.start + self.stride * number for number in range(count)]
        path = Path(self.file)
        try:
            if (length := probe(path, self.file).frames) <= wanted[-1]:
                raise UserError(
                    f"predict.file={self.file} has {length} frames, {count} from frame {self.start} on are needed; set "
                    "predict.start or predict.stride"
                )
            source = read_frames(path, wanted, self.file)
        except BrokenVideoError as error:
            raise UserError(f"predict.file={error} cannot be read as a video") from error
        clip = ClipTransform(image_size=size, crop="center", flip=False)(source)
        return to_uint8(clip * 2 - 1).expand(len(index), -1, -1, -1, -1)
