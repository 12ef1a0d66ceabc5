"""Feed-forward layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def swiglu_width(dim: int, *, multiplier: float | None = None, multiple_of: int = 256) -> int:
    """Hidden width of Llama's feed-forward layer: 8/3 dim, times an optional multiplier, rounded up to a multiple."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) (arXiv 2002.05202).

    Args:
        dim: width of the residual stream.
        hidden: inner width.
        dropout: probability on the output.
        bias: biases on all three projections.
    """

    def __init__(self, *, dim: int, hidden: int, dropout: float, bias: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=bias)
        self.w3 = nn.Linear(dim, hidden, bias=bias)
        self.w2 = nn.Linear(hidden, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self._merged: Tensor | None = None

    def merged(self) -> Tensor:
        """The weights of w1 and w3 in one tensor [2 hidden, dim]: their own memory, so it follows what changes them.

        The first call, and the first one after the weights have moved, moves them together.
        """
        first, third = self.w1.weight, self.w3.weight
        whole = self._merged
        if whole is None or [first.data_ptr(), third.data_ptr()] != [half.data_ptr() for half in whole.chunk(2)]:
            with torch.inference_mode(False), torch.no_grad():
                whole = torch.cat([first.detach(), third.detach()])
                first.data, third.data = whole.chunk(2)
            self._merged = whole
        return whole

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., dim] to [..., dim]."""
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class GeluMLP(nn.Module):
    """fc2(gelu(fc1 x)) with dropout behind both, as in vision transformers.

    Args:
        dim: width of the residual stream.
        hidden: inner width.
        dropout: probability on the inner and on the outer activations.
        bias: biases on both projections.
        inner_dropout: probability on the inner activations alone; None = as dropout.
        approximate: the tanh approximation of the GELU instead of the exact one.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden: int,
        dropout: float,
        bias: bool = True,
        inner_dropout: float | None = None,
        approximate: bool = False,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.approximate = "tanh" if approximate else "none"
        self.inner_dropout = nn.Dropout(dropout if inner_dropout is None else inner_dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., dim] to [..., dim]."""
        return self.dropout(self.fc2(self.inner_dropout(F.gelu(self.fc1(x), approximate=self.approximate))))
