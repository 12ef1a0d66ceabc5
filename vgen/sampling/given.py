"""Tokens that are given instead of decided: a picture of which a part is kept (inpainting, outpainting)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.pixels import from_uint8
from vgen.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Given:
    """Tokens of one picture, the same for every sample.

    Attributes:
        ids: int64 [N], raster order.
        known: bool [N], raster order, where the ids are kept.
    """

    ids: Tensor
    known: Tensor

    @property
    def count(self) -> int:
        """Number of tokens kept."""
        return int(self.known.sum())


@dataclass(frozen=True)
class Edit:
    """Which part of a picture is kept.

    Attributes:
        image: picture file; cut to its central square and resized to the tokenizer's size.
        box: top, left, bottom, right in pixels of that square picture, the last two exclusive.
        keep: ``outside`` of the box (inpainting) or ``inside`` (outpainting). A token is kept if no pixel of its cell
            lies in the other part.
    """

    image: str
    box: Sequence[int]
    keep: Literal["outside", "inside"] = "outside"

    def given(self, tokenizer: Tokenizer) -> Given:
        """Encode the picture and mark what is kept.

        Args:
            tokenizer: on any device; its grid must be (H, W).

        Raises:
            UserError: for an unreadable picture, a box outside it, or one that keeps everything or nothing.
        """
        size, grid = tokenizer.image_size, tokenizer.grid
        if len(grid) != 2:
            raise UserError(f"edit needs tokens that lie on the picture; this tokenizer's grid is {grid}")
        if self.keep not in ("outside", "inside"):
            raise UserError(f"edit.keep={self.keep} must be outside (inpainting) or inside (outpainting)")
        top, left, bottom, right = self._checked_box(size)
        inside = torch.zeros(size, size, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        lost = ~inside if self.keep == "inside" else inside
        cells = lost.view(grid[0], size // grid[0], grid[1], size // grid[1]).any(3).any(1)
        known = ~cells.flatten()
        if bool(known.all()) or not bool(known.any()):
            what = "everything" if bool(known.all()) else "nothing"
            raise UserError(f"edit.box={list(self.box)} with edit.keep={self.keep} keeps {what} of the picture")
        device = tokenizer.codebook.device
        with torch.inference_mode():
            ids = tokenizer.encode(from_uint8(self._picture(size))[None].to(device))[0]
        return Given(ids, known.to(device))

    def _checked_box(self, size: int) -> tuple[int, int, int, int]:
        if len(self.box) != 4:
            raise UserError(f"edit.box={list(self.box)} must be [top, left, bottom, right]")
        top, left, bottom, right = (int(side) for side in self.box)
        if not (0 <= top < bottom <= size and 0 <= left < right <= size):
            raise UserError(f"edit.box={list(self.box)} does not lie in the {size}x{size} picture")
        return top, left, bottom, right

    def _picture(self, size: int) -> Tensor:
        """uint8 [3, size, size]."""
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(Path(self.image)) as image:
                square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"edit.image={self.image} cannot be read as a picture: {error}") from error
        return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
