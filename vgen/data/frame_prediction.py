"""Clips conditioned on their own first frames (LARP, arXiv 2410.21264, section 4.1): token ids of both, cached."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vgen.data.codes import CodeDataset
from vgen.data.extract import cache_codes
from vgen.data.source import Batch, CodeSource, DataSource, Draws
from vgen.data.video_transforms import first_frames
from vgen.errors import UserError

if TYPE_CHECKING:
    from vgen.tokenizers.base import Tokenizer


class FirstFramesEncoder(nn.Module):
    """Encodes, instead of a clip, the clip made of its first frames, the last of them repeated to the old length.

    Args:
        tokenizer: of whole clips.
        given_frames: frames that are given.

    Raises:
        UserError: if the tokenizer is one of pictures or the clips are too short.
    """

    given_frames: Tensor

    def __init__(self, tokenizer: "Tokenizer", given_frames: int) -> None:
        super().__init__()
        check_given_frames(tokenizer, given_frames)
        self.tokenizer = tokenizer
        # In the state dict, so that cached codes of another number of frames are told apart.
        self.register_buffer("given_frames", torch.tensor(given_frames))
        self.image_size, self.num_frames = tokenizer.image_size, tokenizer.num_frames
        self.grid, self.codebook_size = tokenizer.grid, tokenizer.codebook_size

    def encode(self, pixels: Tensor) -> Tensor:
        """Clips [B, 3, T, H, W] in [-1, 1] to ids int64 [B, N] of their first frames."""
        return self.tokenizer.encode(first_frames(pixels, int(self.given_frames)))


def check_given_frames(tokenizer: "Tokenizer", given_frames: int) -> None:
    """Check that a tokenizer's clips can begin with given frames and go on after them.

    Raises:
        UserError: if they cannot.
    """
    frames = tokenizer.num_frames
    if frames is None:
        raise UserError("task.given_frames needs a tokenizer of clips; this one encodes pictures")
    if not 1 <= given_frames < frames:
        raise UserError(f"task.given_frames={given_frames} must lie in 1..{frames - 1} for clips of {frames} frames")


@dataclass(frozen=True, kw_only=True)
class ConditionedCodes:
    """Cached codes of clips with those of their first frames, drawn in the same augmentation.

    Attributes:
        clips: what is predicted.
        conditions: of the first frames.
    """

    clips: CodeDataset
    conditions: CodeDataset

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of clips that could not be encoded."""
        return self.clips.broken

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Batch:
        """First variant of one clip: ids and condition int64 [N], label and index int64 scalars."""
        return self.clips[index] | {"condition": self.conditions[index]["ids"]}

    def __getitems__(self, draws: Draws) -> Batch:
        """A batch: ids and condition int64 [B, N], label and index int64 [B]."""
        return self.clips.__getitems__(draws) | {"condition": self.conditions.__getitems__(draws)["ids"]}


def cache_conditioned_codes(
    source: DataSource, tokenizer: "Tokenizer", folder: str | Path, *, given_frames: int, **options: Any
) -> CodeSource:
    """Cache the codes of clips and of their first frames.

    Args:
        source: clips.
        tokenizer: of whole clips.
        folder: of the clips' codes; those of the first frames lie beside it.
        given_frames: frames that are given.
        options: further arguments of :func:`vgen.data.extract.cache_codes`, the same for both.

    Raises:
        UserError: as :func:`vgen.data.extract.cache_codes`, and for frames that cannot be given.
    """
    folder = Path(folder)
    encoder: Any = FirstFramesEncoder(tokenizer, given_frames)
    clips = cache_codes(source, tokenizer, folder, **options)
    first = folder.with_name(f"{folder.name}-first{given_frames}")
    conditions = cache_codes(source, encoder, first, **options)
    return replace(
        clips,
        train=_paired(clips.train, conditions.train, folder),
        val=_paired(clips.val, conditions.val, folder),
    )


def _paired(
    clips: CodeDataset | ConditionedCodes, conditions: CodeDataset | ConditionedCodes, folder: Path
) -> ConditionedCodes:
    assert isinstance(clips, CodeDataset)
    assert isinstance(conditions, CodeDataset)
    if not torch.equal(clips.rows, conditions.rows):
        raise UserError(f"{folder} and the codes of first frames beside it are of different clips; encode both again")
    return ConditionedCodes(clips=clips, conditions=conditions)
