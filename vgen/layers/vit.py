"""Pre-norm transformer blocks of vision transformers with full attention, under the names of OpenAI's CLIP."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vgen.layers.attention import attend


class SelfAttention(nn.Module):
    """Unmasked multi-head self-attention with biases; names and initialisation of `torch.nn.MultiheadAttention`.

    Args:
        dim: width of the residual stream.
        heads: number of heads; must divide dim.
    """

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within x [B, N, dim]."""
        fused = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = fused.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = attend(query, key, value, causal=False, mask=None, dropout=0.0)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class GeluMLP(nn.Module):
    """c_proj(gelu(c_fc x)) with biases and the exact GELU.

    Args:
        dim: width of the residual stream.
        hidden: inner width.
    """

    def __init__(self, *, dim: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(dim, hidden)
        self.c_proj = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., dim] to the same shape."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class ViTBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), with LayerNorm.

    Args:
        dim: width of the residual stream.
        heads: number of attention heads; must divide dim.
        mlp_ratio: inner width of the feed-forward layer relative to dim.
    """

    def __init__(self, *, dim: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim=dim, heads=heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = GeluMLP(dim=dim, hidden=int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, dim] to the same shape."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *, gradient_checkpointing: bool) -> Tensor:
    """Apply blocks one after the other.

    Args:
        blocks: modules from [B, N, dim] to the same shape.
        x: [B, N, dim].
        gradient_checkpointing: recompute each block in the backward pass instead of storing its activations.
    """
    for block in blocks:
        if gradient_checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = block(x)
    return x


def init_vit(module: nn.Module, *, std: float = 0.02) -> None:
    """Initialise a linear, convolutional, embedding or normalisation layer as ViTs are; to be used with `apply`.

    Weights are normal, truncated at 2; biases are zero. The fused attention projection is a bare parameter and keeps
    its own initialisation.

    Args:
        module: any module.
        std: deviation of the weights.
    """
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=std)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            nn.init.zeros_(bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
