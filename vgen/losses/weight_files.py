"""Weight files of the frozen networks inside perceptual losses: searched locally, read safely, never downloaded."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vgen.errors import UserError


def search_folders(weights: str | Path | None) -> list[Path]:
    """Folders to look in, best first: the one given, those of VGEN_WEIGHTS, torch's own cache.

    Args:
        weights: a folder, or a file whose folder is meant, or None.
    """
    folders = []
    if weights is not None:
        folders.append(Path(weights).parent if Path(weights).is_file() else Path(weights))
    folders += [Path(folder) for folder in os.environ.get("VGEN_WEIGHTS", "").split(os.pathsep) if folder]
    return [*folders, Path(torch.hub.get_dir()) / "checkpoints"]


def find_weights(candidates: list[Path], names: tuple[str, ...], loss: str) -> Path:
    """The first candidate that exists.

    Args:
        candidates: paths, best first.
        names: file names, for the message.
        loss: value of the option `perceptual` that needs it, for the message.

    Raises:
        UserError: if none exists, naming every path tried.
    """
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"perceptual={loss} needs the weight file {' or '.join(names)}, which is in none of: "
        f"{', '.join(map(str, candidates))}; put it there, or name its folder in VGEN_WEIGHTS or perceptual_weights, "
        "or train without it: perceptual=none"
    )


def read_weight_file(path: Path, loss: str) -> dict[str, Tensor]:
    """Read a state dict without running code from the file.

    Raises:
        UserError: if it is damaged or no state dict.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise UserError(f"perceptual={loss}: {path} is truncated or not a weight file; copy it again") from error
    if not isinstance(content, Mapping):
        raise UserError(f"perceptual={loss}: {path} holds no state dict")
    return dict(content)
