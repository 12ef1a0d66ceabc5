"""What LARP's networks are made of: space-time patches and plain transformer blocks.

LARP (arXiv 2410.21264); module names are those of the published weights, and so are the epsilons: 1e-5 inside the
blocks, 1e-6 in the final norms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgen.layers.attention import attend

BLOCK_EPS, FINAL_EPS = 1e-5, 1e-6
Patch = tuple[int, int, int]


class PatchEmbed(nn.Module):
    """Non-overlapping space-time patches: pixels [B, 3, T, H, W] to tokens [B, N, dim] in t, h, w order."""

    def __init__(self, dim: int, patch: Patch):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, patch, stride=patch)
        nn.init.xavier_uniform_(self.proj.weight.data.view(dim, -1))
        nn.init.zeros_(self.get_parameter("proj.bias"))

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed the patches."""
        return self.proj(pixels).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: Patch) -> Tensor:
    """Tokens [B, t * h * w, pt * ph * pw * 3] (channel fastest) to pixels [B, 3, t * pt, h * ph, w * pw]."""
    t, h, w = grid
    pt, ph, pw = patch
    split = tokens.view(-1, t, h, w, pt, ph, pw, 3)
    return split.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(-1, 3, t * pt, h * ph, w * pw)


class SelfAttention(nn.Module):
    """Multi-head attention over all tokens; the fused projection has no bias, the output projection has one."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, dim] to the same shape."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(query, key, value, causal=False, mask=None, dropout=0.0)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with an exact GELU between, four times as wide inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., dim] to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, dim] to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ParallelTransformer(nn.Module):
    """Blocks over [context ; queries], of which the queries are kept; there is no final norm."""

    def __init__(self, *, dim: int, heads: int, depth: int, gradient_checkpointing: bool = False):
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))

    def forward(self, context: Tensor, queries: Tensor) -> Tensor:
        """Map context [B, M, dim] and queries [B, N, dim] to [B, N, dim]; with M = 0 plain self-attention."""
        x = torch.cat([context, queries], dim=1)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x[:, context.shape[1] :]


class FinalLayer(nn.Module):
    """Norm and linear layer to the values of a patch; the linear layer starts at zero."""

    def __init__(self, dim: int, patch: Patch):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=FINAL_EPS)
        self.linear = nn.Linear(dim, 3 * patch[0] * patch[1] * patch[2])

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, dim] to patch values [B, N, pt * ph * pw * 3]."""
        return self.linear(self.norm_final(x))


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weight and zero bias, for every linear layer of LARP."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
