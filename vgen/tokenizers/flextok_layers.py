"""Building blocks of FlexTok's two transformers (arXiv 2502.13967)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.layers.attention import attend
from vgen.layers.mlp import SwiGLU, swiglu_width

Visibility = Literal["full", "causal", "causal_last"]
VISIBILITIES = ("full", "causal", "causal_last")


def layer_norm(x: Tensor) -> Tensor:
    """Normalise the last axis without weights in float32, and cast back."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype)


def visibility_mask(kind: Visibility, patches: int, registers: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Which slots of the sequence (patches, then registers) see which.

    Args:
        kind: ``full``; ``causal``; or ``causal_last``: patches see all patches and no register, register i sees all
            patches and registers 0..i, so that its token does not depend on how many follow.
        patches: number P.
        registers: number K.
        device: where to make it.

    Returns:
        bool [P + K, P + K], True = row sees column.
    """
    total = patches + registers
    mask = torch.ones(total, total, dtype=torch.bool, device=device)
    if kind == "full":
        return mask
    mask = mask.tril()
    if kind == "causal_last":
        mask[:, :patches] = True
    return mask


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, C, h, w] to [B, h / patch, w / patch, patch * patch * C]; inside: row, column, channel."""
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """Inverse of :func:`patchify`."""
    batch, rows, columns, _ = x.shape
    x = x.view(batch, rows, columns, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * patch, columns * patch)


def sincos_table(rows: int, columns: int, dim: int, *, transposed: bool = False) -> Tensor:
    """Fixed position codes of a grid, float32 [1, dim, rows, columns].

    The four quarters of the channels are the sine and cosine of the row and the sine and cosine of the column, at
    frequencies 10000 ** (-4 j / dim).

    Args:
        rows: of the grid.
        columns: of the grid.
        dim: channels, divisible by 4.
        transposed: number the positions of a non-square grid as the original does, which reads its column-major list in
            row-major order (the same table for square grids, which all published models have); for parity only.
    """
    omega = 10000.0 ** (-torch.arange(dim // 4).float() / (dim // 4))
    if transposed:
        first, second = torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="ij")
    else:
        first, second = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    a, b = (axis.flatten().float()[:, None] * omega for axis in (first, second))
    table = torch.cat([a.sin(), a.cos(), b.sin(), b.cos()], dim=1)
    return table.view(rows, columns, dim).permute(2, 0, 1).unsqueeze(0).contiguous()


class PatchPositions(nn.Module):
    """Adds position codes to a grid of patches; a smaller grid uses the table's upper left corner.

    Args:
        dim: channels.
        grid: rows and columns of the largest grid.
        kind: ``sincos`` (a fixed table, stored because published files hold it) or ``learned`` (the sum of one learned
            table per axis, for square grids).

    Raises:
        UserError: for an unknown kind or sizes that do not fit it.
    """

    def __init__(self, *, dim: int, grid: tuple[int, int], kind: str = "sincos") -> None:
        super().__init__()
        if kind not in ("sincos", "learned"):
            raise UserError(f"positions={kind} is unknown; choose sincos or learned")
        self.grid, self.kind = grid, kind
        if kind == "sincos":
            if dim % 4:
                raise UserError(f"sin-cos positions need a width divisible by 4, not {dim}")
            self.table: Tensor
            self.register_buffer("table", sincos_table(*grid, dim))
        else:
            if grid[0] != grid[1]:
                raise UserError(f"learned positions need a square grid, not {grid[0]} x {grid[1]}")
            self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(2, 1, dim, grid[0]), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """Add to x [B, h, w, dim].

        Raises:
            UserError: if the grid of x is larger than the table.
        """
        rows, columns = x.shape[1:3]
        if rows > self.grid[0] or columns > self.grid[1]:
            raise UserError(
                f"a grid of {rows} x {columns} patches exceeds the position table of {self.grid[0]} x {self.grid[1]}"
            )
        if self.kind == "sincos":
            return x + self.table[:, :, :rows, :columns].permute(0, 2, 3, 1)
        row, column = (self.table[axis].transpose(1, 2)[:, :size] for axis, size in enumerate((rows, columns)))
        return x + row[:, :, None] + column[:, None]


class TimeEmbedding(nn.Module):
    """Sinusoidal features of a time, then a two-layer network.

    Args:
        dim: width of the result.
        features: number of features, half cosines, half sines; the longest period is 256 times the shortest.
        max_time: largest time; times are scaled so that it counts as 1000.
    """

    def __init__(self, *, dim: int, features: int = 256, max_time: float = 1.0) -> None:
        super().__init__()
        self.features, self.max_time = features, max_time
        self.mlp = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def sinusoids(self, time: Tensor) -> Tensor:
        """Features float32 [B, features] of times [B]."""
        half = self.features // 2
        decay = torch.exp(-math.log(256.0) * torch.arange(half, device=time.device).float() / half)
        # The frequencies first: angles reach 1000, where another order of products shows in the fifth digit.
        angles = time.float()[:, None] * (1000.0 / self.max_time * decay)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, time: Tensor) -> Tensor:
        """Embedding [B, dim] of times [B]."""
        return self.mlp(self.sinusoids(time).to(self.mlp.get_parameter("0.weight").dtype))


class RegisterAttention(nn.Module):
    """Self-attention with normalised queries and keys, no biases, logits scaled by 8 / head_dim (muP)."""

    def __init__(self, *, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        # What the query must be multiplied by where the attention call scales by 1 / sqrt(head_dim).
        self.query_scale = 8.0 / head_dim * math.sqrt(head_dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within x [B, N, dim] under a mask as in :func:`vgen.layers.attention.attend`."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in (self.wq, self.wk, self.wv)
        )
        q, k = layer_norm(q) * self.query_scale, layer_norm(k)
        out = attend(q, k, v, causal=False, mask=mask, dropout=0.0)
        return self.proj(out.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """Pre-norm attention and gated feed-forward layer."""

    def __init__(self, *, dim: int, head_dim: int) -> None:
        super().__init__()
        self.attn = RegisterAttention(dim=dim, head_dim=head_dim)
        self.mlp = SwiGLU(dim=dim, hidden=swiglu_width(dim, multiple_of=1), dropout=0.0)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map x [B, N, dim] to the same shape."""
        x = x + self.attn(layer_norm(x), mask)
        return x + self.mlp(layer_norm(x))


class DecoderBlock(EncoderBlock):
    """The same, modulated by the time (adaLN-zero of DiT), separately for patches and registers."""

    def __init__(self, *, dim: int, head_dim: int) -> None:
        super().__init__(dim=dim, head_dim=head_dim)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * 6 * dim))

    def forward(self, x: Tensor, mask: Tensor | None, time: Tensor | None = None, patches: int = 0) -> Tensor:
        """Map x [B, N, dim], whose first `patches` slots are patches, under a time embedding [B, dim]."""
        assert time is not None
        parts = self.modulation(time).unflatten(1, (2, 6, -1))
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = parts.unbind(2)
        x = x + _by_kind(self.attn(_by_kind(layer_norm(x), patches, scale_attn, shift_attn), mask), patches, gate_attn)
        return x + _by_kind(self.mlp(_by_kind(layer_norm(x), patches, scale_mlp, shift_mlp)), patches, gate_mlp)


def _by_kind(x: Tensor, patches: int, factor: Tensor, shift: Tensor | None = None) -> Tensor:
    """Scale x [B, N, dim] by one vector for its patches and one for its registers, factor [B, 2, dim].

    With a shift [B, 2, dim] the scale is relative to one: x (1 + factor) + shift. The vectors are never repeated for
    every slot, which would cost more memory than the activations.
    """
    parts = []
    for kind, part in enumerate(x.split([patches, x.shape[1] - patches], dim=1)):
        scale = factor[:, kind, None]
        parts.append(part * scale if shift is None else part * (1 + scale) + shift[:, kind, None])
    return torch.cat(parts, dim=1)


def initialise_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases of every linear layer below a module."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def zero(*layers: nn.Module) -> None:
    """Zero the parameters of layers, so that a residual branch or a prediction starts at nothing."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
