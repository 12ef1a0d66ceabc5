"""Key-value cache: fixed buffers, written by row, passed as an argument."""

import torch
from torch import Tensor

FLOAT8 = (torch.float8_e4m3fn,)
"""Dtypes of one byte that a cache can hold."""


class KVCache:
    """Keys and values of all layers; what they hold before they are written is left open.

    Args:
        layers: number of attention layers.
        batch: rows of the batch (both guidance branches counted).
        heads: number of key-value heads.
        rows: number of cache rows (slots).
        head_dim: width of a head.
        device: where the buffers live.
        dtype: of the buffers.
        row_dtype: of the keys and values of the rows; null = dtype. ``float8_e4m3fn`` takes half the memory of bfloat16
            and rounds to three bits behind the leading one.
        context_heads: number of key-value heads of cross-attention.
        context_rows: features beside the sequence that cross-attention sees; 0 = none.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        heads: int,
        rows: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        context_heads: int = 0,
        context_rows: int = 0,
        row_dtype: torch.dtype | None = None,
    ) -> None:
        self.buffer = torch.empty(layers, 2, batch, heads, rows, head_dim, device=device, dtype=row_dtype or dtype)
        shape = (layers, 2, batch, context_heads, context_rows, head_dim)
        self.beside = torch.zeros(shape, device=device, dtype=dtype) if context_rows else None

    def clear(self) -> None:
        """Fill the rows with zeros, for passes that look at rows not written yet.

        A mask hides such rows, but they must be finite. Other passes do without: it costs as much as one of them.
        """
        self.buffer.zero_()

    def narrow(self, batch: int) -> None:
        """Keep only the first samples: the guidance branch behind them is not needed any more."""
        self.buffer = self.buffer[:, :, :batch]
        if self.beside is not None:
            self.beside = self.beside[:, :, :batch]

    def write_context(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the keys and values [B, heads, T, head_dim] of the context, which later passes read again."""
        assert self.beside is not None
        self.beside[layer, 0].copy_(key)
        self.beside[layer, 1].copy_(value)

    def context(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the context, views [B, heads, T, head_dim]."""
        assert self.beside is not None
        return self.beside[layer, 0], self.beside[layer, 1]

    def write(
        self, layer: int, key: Tensor, value: Tensor, rows: Tensor, row_start: int, prefix: int
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values [B, heads, F, head_dim] of the fed slots and return those of the visible prefix.

        Args:
            layer: index of the attention layer.
            key: keys of the fed slots.
            value: values of the fed slots.
            rows: int64 [F] or [B, F], rows to write.
            row_start: first row if they are consecutive (written without an index), else -1.
            prefix: number of leading rows to return.

        Returns:
            Keys and values, views [B, heads, prefix, head_dim].
        """
        for slot, new in enumerate((key, value)):
            store, new = self.buffer[layer, slot], new.to(self.buffer.dtype)
            if store.dtype in FLOAT8:
                # PyTorch copies such numbers to indices only as bytes.
                store, new = store.view(torch.uint8), new.view(torch.uint8)
            if row_start >= 0:
                store[:, :, row_start : row_start + new.shape[2]] = new
            elif rows.dim() == 2:
                store.scatter_(2, rows[:, None, :, None].expand_as(new), new)
            else:
                store.index_copy_(2, rows, new)
        return self.visible(layer, prefix)

    def window(self, layer: int, row_start: int, count: int) -> Tensor:
        """Consecutive rows of the keys and values of a layer, a view [2, B, heads, count, head_dim] to write to."""
        return self.buffer[layer, :, :, :, row_start : row_start + count]

    def visible(self, layer: int, prefix: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the leading rows, views [B, heads, prefix, head_dim]."""
        return self.buffer[layer, 0, :, :, :prefix], self.buffer[layer, 1, :, :, :prefix]
