"""Text features computed in advance, such as T5's or CLIP's, in a safetensors file."""

from pathlib import Path

import torch
from torch import Tensor

from vgen.checkpoints.convert import read_weights
from vgen.errors import UserError


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
