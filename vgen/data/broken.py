"""Unreadable images: how they are recognised, carried through batches and reported at the end of a run."""

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vgen.data.transforms import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image


class BrokenImageError(Exception):
    """An image file that cannot be decoded; the message is its name and the reason."""


class BrokenImages:
    """Names of the broken images met so far, each once.

    Worker processes and threads do not share it: they put names into the ``broken`` entry of their batches and the
    loader, in the main process, moves them here.
    """

    def __init__(self, names: Iterable[str] = ()):
        self._names = dict.fromkeys(names)

    def add(self, names: Iterable[str]) -> None:
        """Record names; known ones are ignored."""
        self._names.update(dict.fromkeys(names))

    def __len__(self) -> int:
        return len(self._names)

    @property
    def names(self) -> list[str]:
        """Names in the order in which they were met."""
        return list(self._names)

    def summary(self, limit: int = 20) -> str:
        """One paragraph for the end of a run, empty if nothing was broken.

        Args:
            limit: names listed at most.
        """
        if not self._names:
            return ""
        listed = self.names[:limit]
        more = f"\n  ... and {len(self) - limit} more" if len(self) > limit else ""
        plural = "image was" if len(self) == 1 else "images were"
        return f"{len(self)} broken {plural} skipped:\n  " + "\n  ".join(listed) + more


def decode_image(data: bytes | None, name: str) -> "Image":
    """Decode an image file completely and convert it to RGB.

    Args:
        data: the encoded file.
        name: for messages.

    Raises:
        BrokenImageError: if the bytes are missing, empty, truncated or no image.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise BrokenImageError(f"{name} (empty)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(image)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        # Its own message holds a memory address, which would make one image look like many.
        raise BrokenImageError(f"{name} (not an image)") from error
    # PIL's decoders raise nearly anything on corrupt input: OSError, SyntaxError, ValueError, struct.error, IndexError.
    except Exception as error:
        raise BrokenImageError(f"{name} ({' '.join(f'{type(error).__name__} {error}'.split())})") from error
