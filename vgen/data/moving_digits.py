"""The embedded video data set: scanned handwritten digits that move and bounce, made when drawn, without any download.

In the manner of Moving MNIST (Srivastava et al., arXiv 1502.04681), with scikit-learn's digits and a class per clip.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from vgen.data.arrays import resize_pictures
from vgen.data.source import Batch, DataSource, Draws, stratified_split
from vgen.errors import UserError
from vgen.pixels import from_uint8
from vgen.random import keyed_uniform

if TYPE_CHECKING:
    from PIL.Image import Image

FPS = 10.0
"""Frames per second at which the clips are to be shown."""
SCAN, TOP, LEFT, SPEED, ANGLE = range(5)
"""Independent random streams of one clip."""


@dataclass(frozen=True, kw_only=True)
class MovingDigits:
    """Clips of digits of one class; fulfils :class:`vgen.data.source.VideoDataset`.

    Everything about a clip is a function of the seed and its key: its place in the set, or, for fresh clips, the draw.

    Attributes:
        scans: uint8 [m, D, D], antialiased scans.
        scan_labels: int64 [m].
        labels: int64 [n], class of each clip.
        keys: int64 [n], random key of each clip.
        image_size: side of the frames in pixels.
        num_frames: frames of a clip.
        num_digits: digits in a clip, all of its class.
        speed: slowest and fastest motion in pixels per frame.
        fresh: new scans and motions at every draw; otherwise a clip is always the same.
        seed: of all draws.
    """

    scans: Tensor
    scan_labels: Tensor
    labels: Tensor
    keys: Tensor
    image_size: int
    num_frames: int
    num_digits: int
    speed: tuple[float, float]
    fresh: bool
    seed: int = 0
    broken: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """One clip without augmentation: pixels float32 [3, T, S, S] in [-1, 1], label and index int64 scalars."""
        return {"pixels": from_uint8(self.picture(index)), "label": self.labels[index], "index": torch.tensor(index)}

    def __getitems__(self, draws: Draws) -> Batch:
        """A batch: pixels float32 [B, 3, T, S, S], label int64 [B], index int64 [B]."""
        index, draw = torch.as_tensor(draws, dtype=torch.int64).unbind(1)
        clips = self._clips(self.labels[index], draw if self.fresh else self.keys[index], fresh=self.fresh)
        pixels = from_uint8(clips[:, None].expand(-1, 3, -1, -1, -1))
        return {"pixels": pixels, "label": self.labels[index], "index": index}

    def picture(self, index: int) -> Tensor:
        """The clip at ``index`` as uint8 [3, T, S, S]."""
        return self.pictures(torch.tensor([index]))[0]

    def pictures(self, indices: Tensor) -> Tensor:
        """The clips at ``indices`` (int64 [B]) as uint8 [B, 3, T, S, S], which is a view of one grey plane."""
        clips = self._clips(self.labels[indices], self.keys[indices], fresh=False)
        return clips[:, None].expand(-1, 3, -1, -1, -1)

    def raw(self, index: int) -> "Image":
        """The first frame as RGB image."""
        from PIL import Image

        return Image.fromarray(self.picture(index)[:, 0].permute(1, 2, 0).contiguous().numpy())

    def name(self, index: int) -> str:
        """The name of a clip in messages."""
        return f"moving digit {int(self.keys[index])}"

    def subset(self, indices: Tensor) -> Self:
        """The clips at ``indices`` (int64 [m])."""
        return replace(self, labels=self.labels[indices], keys=self.keys[indices])

    def without_augmentation(self) -> Self:
        """The same clips, the same at every draw."""
        return replace(self, fresh=False)

    def fingerprint(self) -> str:
        """Hash of scans, labels, keys and all options that shape a clip."""
        options = (self.image_size, self.num_frames, self.num_digits, self.speed, self.seed)
        digest = hashlib.sha256(repr(options).encode())
        for tensor in (self.scans, self.scan_labels, self.labels, self.keys):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def _clips(self, labels: Tensor, keys: Tensor, *, fresh: bool) -> Tensor:
        """Render clips of the classes labels [B] under keys [B], uint8 [B, T, S, S]."""
        canvas = torch.zeros(len(labels), self.num_frames, self.image_size, self.image_size, dtype=torch.uint8)
        for digit in range(self.num_digits):
            number = keys * self.num_digits + digit
            stream = (self.seed, int(fresh), number)
            scans = self.scans[self._choose(labels, keyed_uniform(*stream, SCAN))]
            top, left = self._path(stream)
            canvas = torch.maximum(canvas, _pasted(scans, top, left, self.image_size))
        return canvas

    def _choose(self, labels: Tensor, uniform: Tensor) -> Tensor:
        """A scan of the right class for each clip: the class's scans are equally likely."""
        order = self.scan_labels.sort(stable=True).indices
        counts = torch.bincount(self.scan_labels)
        starts = counts.cumsum(0) - counts
        return order[starts[labels] + (uniform * counts[labels]).long()]

    def _path(self, stream: tuple[int, int, Tensor]) -> tuple[Tensor, Tensor]:
        """Top and left edge [B, T] of a digit that moves straight and is reflected by the frame's edges."""
        room = self.image_size - self.scans.shape[-1]
        speed = self.speed[0] + keyed_uniform(*stream, SPEED) * (self.speed[1] - self.speed[0])
        angle = keyed_uniform(*stream, ANGLE) * (2 * torch.pi)
        time = torch.arange(self.num_frames)

        def edge(start: int, velocity: Tensor) -> Tensor:
            place = keyed_uniform(*stream, start)[:, None] * room + velocity[:, None] * time
            # A triangle wave: the reflection of straight motion between 0 and room.
            return (room - (place.remainder(2 * room) - room).abs()).round().long()

        return edge(TOP, speed * angle.sin()), edge(LEFT, speed * angle.cos())


def _pasted(scans: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Scans uint8 [B, D, D] at top and left [B, T] on black frames, uint8 [B, T, size, size]."""
    side = scans.shape[-1]
    padded = F.pad(scans, (1, 1, 1, 1))
    span = torch.arange(size)

    def source(edge: Tensor) -> Tensor:
        return (span - edge[..., None] + 1).clamp(0, side + 1)

    batch = torch.arange(len(scans))[:, None, None, None]
    return padded[batch, source(top)[..., :, None], source(left)[..., None, :]]


def moving_digits(
    *,
    image_size: int,
    num_frames: int,
    digit_size: int,
    num_digits: int,
    min_speed: float,
    max_speed: float,
    train_clips: int,
    val_clips: int,
    fresh: bool,
    val_fraction: float,
    seed: int,
) -> DataSource:
    """Moving digits; the class of a clip is its digit, and no scan is in both splits.

    Args:
        image_size: side of the frames in pixels.
        num_frames: frames of a clip.
        digit_size: side of a digit in pixels; the scans are 8x8.
        num_digits: digits per clip, all of the clip's class.
        min_speed: slowest motion in pixels per frame.
        max_speed: fastest motion.
        train_clips: clips per epoch of training; where codes are cached, the clips that are encoded.
        val_clips: clips of the validation set, always the same.
        fresh: training clips are new at every draw instead of the same in every epoch.
        val_fraction: share of the scans of every class that only validation clips show.
        seed: of the split and of all clips.

    Raises:
        UserError: if an option is out of range.
    """
    from sklearn.datasets import load_digits

    if not 1 <= digit_size < image_size:
        raise UserError(f"data.digit_size={digit_size} must be between 1 and data.image_size - 1 = {image_size - 1}")
    for key, value in (("num_frames", num_frames), ("num_digits", num_digits)):
        if value < 1:
            raise UserError(f"data.{key}={value} must be at least 1")
    if not 0 <= min_speed <= max_speed:
        raise UserError(
            f"data.min_speed={min_speed} must lie between 0 and data.max_speed={max_speed} pixels per frame"
        )
    if min(train_clips, val_clips) < 10:
        raise UserError("data.train_clips and data.val_clips must be at least 10, one per class")
    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).long()
    scans = resize_pictures(torch.from_numpy(bunch.images).float()[:, None] * (255 / 16), digit_size)[:, 0]

    def clips(chosen: Tensor, first: int, count: int, fresh: bool) -> MovingDigits:
        return MovingDigits(
            scans=scans[chosen],
            scan_labels=labels[chosen],
            labels=torch.arange(count) % 10,
            keys=torch.arange(first, first + count),
            image_size=image_size,
            num_frames=num_frames,
            num_digits=num_digits,
            speed=(float(min_speed), float(max_speed)),
            fresh=fresh,
            seed=seed,
        )

    train, val = stratified_split(labels, val_fraction, seed)
    names = tuple(str(digit) for digit in range(10))
    held_out = clips(val, train_clips, val_clips, False)
    return DataSource("moving-digits", clips(train, 0, train_clips, fresh), held_out, 10, names, image_size, fps=FPS)
