"""What a data configuration returns, what its data sets can do, and the checks and splits all sources share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.random import keyed_permutation

if TYPE_CHECKING:
    from PIL.Image import Image

    from vgen.data.codes import CodeDataset
    from vgen.data.frame_prediction import ConditionedCodes

Draws = Sequence[tuple[int, int]]
"""(index into the data set, global sample counter) pairs; all augmentation is a function of (seed, counter)."""

Batch = dict[str, Any]
"""``pixels`` or ``ids``, ``label`` int64 [B], ``index`` int64 [B]; from a data set also ``broken``, a list of names."""


class ImageDataset(Protocol):
    """Pictures with class labels, in memory or on disk."""

    @property
    def labels(self) -> Tensor:
        """All labels, int64 [n]."""
        ...

    @property
    def image_size(self) -> int:
        """Side of the square pictures in pixels."""
        ...

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of pictures that were found unreadable when the set was built and are not part of it."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch:
        """One picture without augmentation: pixels float32 [3, H, W] in [-1, 1], label and index int64 scalars."""
        ...

    def __getitems__(self, draws: Draws) -> Batch:
        """A batch; ``index`` differs from the asked one where a broken picture was replaced."""
        ...

    def raw(self, index: int) -> "Image":
        """The RGB picture before any crop; raises :class:`vgen.data.broken.BrokenImageError`."""
        ...

    def picture(self, index: int) -> Tensor:
        """The picture without augmentation as uint8 [3, S, S]; raises like :meth:`raw`."""
        ...

    def name(self, index: int) -> str:
        """The name of a picture in messages."""
        ...

    def subset(self, indices: Tensor) -> Self:
        """The pictures at ``indices`` (int64 [m]), otherwise unchanged."""
        ...

    def without_augmentation(self) -> Self:
        """The same pictures, always centrally cropped, never flipped or shifted."""
        ...

    def fingerprint(self) -> str:
        """Hexadecimal hash that changes when pictures, labels, order or the fixed crop change."""
        ...


class VideoDataset(ImageDataset, Protocol):
    """Clips with class labels, of one length: ``pixels`` is float32 [3, T, H, W], ``picture`` uint8 [3, T, S, S].

    ``raw`` is the first frame of the clip.
    """

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        ...


@dataclass(frozen=True)
class DataSource:
    """A data set of pictures or clips, split in two.

    Attributes:
        name: of the data, as it appears in reports.
        train: augmented pictures.
        val: pictures without augmentation.
        num_classes: labels are 0..num_classes-1.
        class_names: one per class.
        image_size: side of the square pictures in pixels.
        fps: frames per second at which clips are to be shown, None for pictures or where unknown.
    """

    name: str
    train: ImageDataset
    val: ImageDataset
    num_classes: int
    class_names: tuple[str, ...]
    image_size: int
    fps: float | None = None

    def __post_init__(self) -> None:
        assert len(self.class_names) == self.num_classes

    @property
    def num_frames(self) -> int | None:
        """Frames of a clip, None for pictures."""
        return getattr(self.train, "num_frames", None)


@dataclass(frozen=True)
class CodeSource:
    """A data set of token ids that a tokenizer made once and for all.

    Attributes:
        name: of the data that was encoded.
        train: token ids with a stored augmentation drawn per sample.
        val: token ids of the plain pictures.
        num_classes: labels are 0..num_classes-1.
        class_names: one per class.
        image_size: side in pixels of the pictures that were encoded.
        grid: token grid of one picture.
        codebook_size: ids are 0..codebook_size-1.
        tokenizer_hash: :func:`vgen.data.codes.tokenizer_fingerprint` of the tokenizer that made the ids.
    """

    name: str
    train: "CodeDataset | ConditionedCodes"
    val: "CodeDataset | ConditionedCodes"
    num_classes: int
    class_names: tuple[str, ...]
    image_size: int
    grid: tuple[int, ...]
    codebook_size: int
    tokenizer_hash: str


def check_labels(labels: Tensor, num_classes: int, *, where: str | Path) -> None:
    """Check that labels (int64 [n]) are in 0..num_classes-1.

    Raises:
        UserError: naming the first offender.
    """
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        raise UserError(
            f"{where}: label {int(labels[first])} of image {first} is outside 0..{num_classes - 1}; "
            "correct the labels or set data.num_classes"
        )


def existing_folder(path: str | Path, *, key: str = "data.path") -> Path:
    """Expand and check a folder given by the user.

    Raises:
        UserError: if it does not exist or is a file.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{key}={folder} {reason}; give the folder that holds the data")
    return folder


def resolve_classes(
    num_classes: int | None, class_names: Iterable[str] | None, found: int, *, where: str | Path
) -> tuple[int, tuple[str, ...]]:
    """Number and names of the classes from what the user set and what the data hold.

    Args:
        num_classes: as set by the user, or None.
        class_names: as set by the user or stored with the data, or None.
        found: largest label plus one.
        where: for the message.

    Raises:
        UserError: if number and names disagree.
    """
    names = None if class_names is None else tuple(str(name) for name in class_names)
    count = num_classes if num_classes is not None else len(names) if names else found
    if names is not None and len(names) != count:
        raise UserError(f"{where}: data.num_classes={count} but there are {len(names)} class names; make them agree")
    return count, names if names is not None else tuple(str(i) for i in range(count))


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split a data set so that every class keeps its share on both sides.

    Args:
        labels: int64 [n].
        fraction: share of the second part, in (0, 1).
        seed: the split depends on nothing else.

    Returns:
        Sorted indices (train, val); val has round(fraction * n) entries.

    Raises:
        UserError: if the fraction is out of range or leaves one side empty.
    """
    if not 0 < fraction < 1:
        raise UserError(f"data.val_fraction={fraction} must be between 0 and 1 (for example 0.05)")
    size = len(labels)
    target = round(fraction * size)
    if target in (0, size):
        raise UserError(
            f"data.val_fraction={fraction} leaves {size - target} of {size} images for training and {target} for "
            "validation; add images or change the fraction"
        )
    counts = torch.bincount(labels)
    share = counts.double() * target / size
    quota = share.floor().long()
    remainder = (share - quota).sort(descending=True, stable=True).indices
    quota[remainder[: target - int(quota.sum())]] += 1
    order = keyed_permutation(size, seed)
    order = order[labels[order].sort(stable=True).indices]
    starts = counts.cumsum(0) - counts
    rank_in_class = torch.arange(size) - starts.repeat_interleave(counts)
    is_val = torch.zeros(size, dtype=torch.bool)
    is_val[order] = rank_in_class < quota.repeat_interleave(counts)
    indices = torch.arange(size)
    return indices[~is_val], indices[is_val]
