"""How slots enter the network: token embeddings, absolute positions, directions of travel."""

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgen.errors import UserError
from vgen.layers.rope import grid_coordinates
from vgen.layers.sincos import sincos_1d


class CodebookEmbedding(nn.Module):
    """Token embedding by the tokenizer's frozen codebook and a trained projection (DAR, arXiv 2503.11129).

    Args:
        vocab_size: number of codes V.
        codebook_dim: width of a code.
        dim: width of the generator.
    """

    codebook: Tensor

    def __init__(self, *, vocab_size: int, codebook_dim: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.zeros(vocab_size, codebook_dim))
        self.projection = nn.Linear(codebook_dim, dim)

    @torch.no_grad()
    def load_codebook(self, codebook: Tensor, *, std: float) -> None:
        """Take over a tokenizer's codebook [V, codebook_dim] and scale the projection so that outputs have ``std``.

        Raises:
            UserError: if the codebook has another shape.
        """
        if codebook.shape != self.codebook.shape:
            raise UserError(
                f"the tokenizer's codebook is {list(codebook.shape)}, the generator expects "
                f"{list(self.codebook.shape)}; set generator.codebook_dim={codebook.shape[1]}"
            )
        self.codebook.copy_(codebook)
        nn.init.normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)
        spread = (self.codebook @ self.projection.weight.T).std()
        self.projection.weight.mul_(std / spread.clamp(min=1e-12))

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids int64 [...] as [..., dim]."""
        return self.projection(F.embedding(ids, self.codebook))


class FixedTable(nn.Module):
    """A table that is looked up like an embedding but never trained.

    Args:
        table: float32 [rows, dim].
    """

    weight: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", table)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows int64 [...] of the table as [..., dim]."""
        return F.embedding(rows, self.weight)


class Positions(nn.Module):
    """Absolute positions: a vector for the place of what a slot holds, and one for the place it predicts.

    Args:
        num_condition: condition slots C, which have places of their own in front.
        num_tokens: tokens of the grid N.
        dim: width of the generator.
        target: also learn vectors for the predicted place (RAR's target-aware embedding, arXiv 2411.00776 section 3.3).
        last: the last place of the grid has a vector; orders that never feed its token can do without (LARP).
        fixed: sine-cosine vectors of the places counted from the first condition slot, instead of learned ones.
    """

    def __init__(
        self, *, num_condition: int, num_tokens: int, dim: int, target: bool, last: bool = True, fixed: bool = False
    ) -> None:
        super().__init__()
        self.num_condition, self.num_places = num_condition, num_tokens if last else num_tokens - 1
        rows = num_condition + self.num_places
        self.own: nn.Embedding | FixedTable
        self.own = FixedTable(sincos_1d(dim, torch.arange(rows)).float()) if fixed else nn.Embedding(rows, dim)
        self.target = nn.Embedding(num_tokens, dim) if target else None

    def forward(self, slots: Tensor, own: Tensor, target: Tensor, num_tokens: int) -> Tensor:
        """Vectors of slots, [F, dim] or [B, F, dim].

        Args:
            slots: int64 [F], slot numbers; those below C are condition slots.
            own: int64 [F] or [B, F], raster position of what the slot holds, ``num_tokens`` for none.
            target: likewise for what it predicts.
            num_tokens: number of tokens N.
        """
        is_condition = slots < self.num_condition
        rows = torch.where(is_condition, slots, own + self.num_condition)
        out = _lookup(self.own, rows, is_condition | (own < num_tokens))
        if self.target is not None:
            out = out + _lookup(self.target, target, target < num_tokens)
        return out


def _lookup(table: nn.Embedding | FixedTable, rows: Tensor, valid: Tensor) -> Tensor:
    """Rows of a table, zero where not valid."""
    return table(rows.masked_fill(~valid, 0)) * valid[..., None].to(table.weight.dtype)


class Directions(nn.Module):
    """Learned vector of the move from a slot's place to the place it predicts (DAR, arXiv 2503.11129).

    Args:
        grid: token grid.
        moves: moves by number, beginning with 1; 0 stands for slots without a move.
        dim: width of the generator.

    Raises:
        UserError: for a move with another number of axes than the grid.
    """

    numbers: Tensor
    coordinates: Tensor

    def __init__(self, *, grid: tuple[int, ...], moves: Sequence[Sequence[int]], dim: int) -> None:
        super().__init__()
        self.moves = [tuple(move) for move in moves]
        reach = {move: index for index, move in enumerate(product(*(range(1 - side, side) for side in grid)))}
        if wrong := [move for move in self.moves if len(move) != len(grid)]:
            raise UserError(f"generator.directions: {list(wrong[0])} is not a move on the grid {grid}")
        numbers = torch.full((len(reach),), -1)
        for number, move in enumerate(self.moves, 1):
            if move in reach:
                numbers[reach[move]] = number
        coordinates = torch.cat([grid_coordinates(grid), torch.zeros(1, len(grid), dtype=torch.int64)])
        self.grid = grid
        self.register_buffer("numbers", numbers, persistent=False)
        self.register_buffer("coordinates", coordinates, persistent=False)
        self.embeddings = nn.Embedding(len(self.moves) + 1, dim)

    def number(self, own: Tensor, target: Tensor) -> Tensor:
        """Numbers of the moves int64 [...] between raster positions [...]; the number of tokens stands for no place."""
        move = self.coordinates[target] - self.coordinates[own]
        index = torch.zeros_like(own)
        for axis, side in enumerate(self.grid):
            index = index * (2 * side - 1) + move[..., axis] + side - 1
        somewhere = (own < prod(self.grid)) & (target < prod(self.grid))
        return self.numbers[index].masked_fill(~somewhere, 0)
