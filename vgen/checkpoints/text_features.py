"""Text features computed in advance, such as T5's or CLIP's, in a safetensors file."""

from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from vgen.checkpoints.convert import read_weights
from vgen.errors import UserError
from vgen.generators.joint_text import Captions


def read_text_features(path: str | Path) -> Tensor:
    """The tensor ``features`` of a file, float [captions, T, E], mapped rather than read where the system can.

    Args:
        path: safetensors file; features of padding are zeros.

    Raises:
        UserError: if the file is unreadable or holds no such tensor.
    """
    content = read_weights(path)
    features = content.get("features") if isinstance(content, dict) else None
    if not isinstance(features, torch.Tensor) or features.dim() != 3 or not features.is_floating_point():
        found = list(features.shape) if isinstance(features, torch.Tensor) else "nothing"
        raise UserError(f"{path} must hold a tensor named features, float [captions, tokens, width]; found {found}")
    return features


def read_captions(path: str | Path) -> Captions:
    """The captions of a file: ``features`` and ``pooled``, and ``decoder_features`` and ``scores`` where it has them.

    Args:
        path: safetensors file; the last row of every tensor is the empty string. See
            :class:`vgen.generators.joint_text.Captions`.

    Raises:
        UserError: if the file is unreadable, or a tensor is missing, unknown or of an unfitting shape.
    """
    content = read_weights(path)
    names = {item.name for item in fields(Captions)}
    found = set(content) if isinstance(content, dict) else set()
    if not {"features", "pooled"} <= found <= names:
        raise UserError(
            f"{path} must hold tensors named features and pooled, and may hold decoder_features and scores, the last "
            f"row of each for the empty string; found {', '.join(sorted(found)) or 'nothing'}"
        )
    try:
        return Captions(**content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
