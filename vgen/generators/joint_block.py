"""The block of two streams: text and tokens with weights of their own, attending jointly."""

import torch
from torch import Tensor, nn

from vgen.generators.block import Block, BlockShape
from vgen.layers.attention import Attention, View
from vgen.layers.modulation import Modulation
from vgen.layers.norm import make_norm


class TextEntry(nn.Module):
    """What is left of the text's half in the last block, where nobody reads the text any more: keys and values.

    Its queries are computed with them, as in the published networks, and see nothing.

    Args:
        shape: as of the block.
    """

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.attention_norm = make_norm(shape.norm, shape.dim, eps=shape.norm_eps, affine=shape.norm_affine)
        self.attention = Attention(
            dim=shape.dim,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            dropout=shape.attention_dropout,
            residual_dropout=shape.residual_dropout,
            bias=shape.bias,
            qkv_bias=shape.qkv_bias,
            qk_norm=shape.qk_norm,
            norm_eps=shape.norm_eps,
            output=False,
        )
        self.modulation = Modulation(dim=shape.dim, parts=2)

    def before(self, x: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, T, head_dim] of text x [B, T, dim]."""
        assert view.modulator is not None
        shift, scale = self.modulation(view.modulator)
        return self.attention.project(self.attention_norm(x) * (1 + scale) + shift, None)


class JointBlock(nn.Module):
    """Block of MM-DiT (Stable Diffusion 3, arXiv 2403.03206, section 4) over slots [text | tokens].

    Both streams are modulated by one vector per sample.

    Args:
        shape: sizes and switches of either stream.
        num_text: slots of text T at the start of the sequence.
        drop_path: stochastic depth of this block.
        last: the text ends here: it is attended to but not changed.
    """

    def __init__(self, shape: BlockShape, *, num_text: int, drop_path: float, last: bool) -> None:
        super().__init__()
        self.num_text = num_text
        self.tokens = Block(shape, drop_path=drop_path, in_parts=True)
        self.text = TextEntry(shape) if last else Block(shape, drop_path=drop_path, in_parts=True)

    def forward(self, x: Tensor, view: View, layer: int, skipped: Tensor | None = None) -> Tensor:
        """Map x [B, T + F, dim]; ``layer`` as in :class:`vgen.generators.block.Block`, ``skipped`` is not used."""
        assert view.modulator is not None
        assert view.cache is None, "every pass feeds all slots"
        assert self.tokens.modulation is not None
        text, tokens = x.tensor_split([self.num_text], dim=1)
        changes = self.tokens.modulation(view.modulator)
        text_changes: tuple[Tensor, ...] = ()
        if isinstance(self.text, TextEntry):
            projected: tuple[Tensor | None, ...] = self.text.before(text, view)
        else:
            assert self.text.modulation is not None
            text_changes = self.text.modulation(view.modulator)
            projected = self.text.before(text, None, text_changes[:2], None)
        both = zip(projected, self.tokens.before(tokens, None, changes[:2], None), strict=True)
        # Without a cache nothing is written, so every part is there.
        parts = [[part for part in pair if part is not None] for pair in both]
        query, key, value = (torch.cat(pair, dim=2) for pair in parts)
        seen = self.tokens.attention.look(query, key, value, view, layer)
        seen_text, seen_tokens = seen.tensor_split([self.num_text], dim=1)
        tokens = self.tokens.behind(tokens, seen_tokens, changes[2:])
        if isinstance(self.text, Block):
            text = self.text.behind(text, seen_text, text_changes[2:])
        return torch.cat([text, tokens], dim=1)
