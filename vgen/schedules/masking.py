"""How many tokens of a masked order are hidden, in training and while decoding."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vgen.errors import UserError

Ratio = Literal["arccos", "cosine", "linear", "square", "root"]
LEAST_SHARE = 1e-6


def hidden_share(ratio: Ratio, progress: Any) -> Any:
    """Share of the tokens that is hidden, falling from 1 to 0 (MaskGIT, arXiv 2202.04200, section 3.3).

    Args:
        ratio: how the share falls; ``arccos`` is what TiTok's generators use.
        progress: in [0, 1], a number or a tensor.

    Returns:
        The share, of the type of ``progress``.
    """
    library = torch if isinstance(progress, Tensor) else math
    if ratio == "arccos":
        return library.acos(progress) / (math.pi / 2)
    if ratio == "cosine":
        return library.cos(progress * (math.pi / 2))
    if ratio == "square":
        return 1 - progress**2
    return 1 - (library.sqrt(progress) if ratio == "root" else progress)


def check_ratio(ratio: str) -> None:
    """Refuse an unknown name.

    Raises:
        UserError: naming the ratios there are.
    """
    if ratio not in get_args(Ratio):
        raise UserError(f"schedule.ratio={ratio} is unknown; choose one of {', '.join(get_args(Ratio))}")


@dataclass(frozen=True)
class Masking:
    """Which tokens training hides.

    Attributes:
        ratio: share of hidden tokens over a uniform draw.
        rounding: of the number of tokens, ``nearest`` or ``up`` (MAR).
    """

    ratio: Ratio = "arccos"
    rounding: Literal["nearest", "up"] = "nearest"

    def hidden(self, progress: Tensor, draws: Tensor) -> Tensor:
        """Choose the tokens to hide; at least one per sample.

        Args:
            progress: float [B], uniform in [0, 1).
            draws: float [B, N], uniform; their order decides which tokens.

        Returns:
            bool [B, N].
        """
        share = hidden_share(self.ratio, progress).clamp(LEAST_SHARE, 1.0)
        count = draws.shape[1] * share
        count = (count.round() if self.rounding == "nearest" else count.ceil()).clamp(min=1)
        return draws.argsort(1) < count[:, None]
