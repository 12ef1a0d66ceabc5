"""Where the slots of a call lie on the grid, and which condition slots are padding."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vgen.schedules.plan import Feed


@dataclass(frozen=True)
class Places:
    """Raster positions of a set of slots; the number of tokens stands for no place.

    Attributes:
        own: int64 [F] or [B, F], of what the slot holds.
        target: likewise, of what it predicts.
        queries: int64 [number of query slots] or with a batch axis, of the tokens asked for.
    """

    own: Tensor
    target: Tensor
    queries: Tensor

    @staticmethod
    def of(feed: Feed, order: Tensor) -> "Places":
        """Look a feed's order indices up in an order int64 [N] or [B, N]."""
        nowhere = order.new_full((*order.shape[:-1], 1), order.shape[-1])
        table = torch.cat([order, nowhere], dim=-1)

        def look_up(index: Tensor) -> Tensor:
            if index.dim() == 2 and table.dim() == 2:
                return table.gather(1, index.masked_fill(index < 0, order.shape[-1]))
            return table[..., index]

        return Places(look_up(feed.position), look_up(feed.target), look_up(feed.queries))


class Located(NamedTuple):
    """What slots take from their places and their visibility alone, so that a plan's passes can be prepared once.

    Attributes:
        places: raster positions.
        rope: rotary rows; None = none.
        bias: visibility as a summand of the attention scores, [F, prefix]; None = as the pass says.
    """

    places: Places
    rope: Tensor | None
    bias: Tensor | None = None


def values_at(values: Tensor, index: Tensor, start: int = -1) -> Tensor:
    """Values [B, N] at int64 [F], which count up from ``start`` unless it is -1, or at the samples' own [B, F]."""
    if start >= 0:
        return values[:, start : start + len(index)]
    return values[:, index] if index.dim() == 1 else values.gather(1, index)


def mask_padding(visible: Tensor, padding: Tensor, rows: Tensor) -> Tensor:
    """Hide padded condition slots, which keep seeing themselves (LlamaGen section 4).

    Args:
        visible: bool [F, P] or [B, 1, F, P].
        padding: bool [B, C], True = valid; condition slots occupy the first C columns.
        rows: int64 [F] or [B, F], column of each query itself.

    Returns:
        bool [B, 1, F, P].
    """
    prefix = visible.shape[-1]
    columns = torch.ones(len(padding), prefix, dtype=torch.bool, device=visible.device)
    columns[:, : padding.shape[1]] = padding
    itself = rows[..., None] == torch.arange(prefix, device=visible.device)
    if visible.dim() == 4:
        visible, itself = visible[:, 0], itself.expand(len(padding), -1, -1)
    return ((visible & columns[:, None, :]) | (visible & itself)).unsqueeze(1)
