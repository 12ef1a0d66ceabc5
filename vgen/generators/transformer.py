"""The one decoder-only transformer: it knows slots, not decode orders.

With the ``raster`` plan and the default switches this is LlamaGen's GPT (arXiv 2406.06525, section 2.2); the switches
cover its relatives NAR, PAR, RandAR, RAR, DAR and LARP, the generators of FlexTok, and the bidirectional networks of
MaskGIT, TiTok and TA-TiTok (MaskGen).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgen.errors import UserError
from vgen.generators.block import Block, BlockShape, FeedForwardKind
from vgen.generators.checks import (
    AdaLNInput,
    check_adaln,
    check_choices,
    check_combinations,
    refused_outputs,
    refused_streams,
)
from vgen.generators.conditioning import ClassCondition, TextCondition, TextContext, TokenCondition
from vgen.generators.embedding import CodebookEmbedding, Directions, Positions
from vgen.generators.heads import Heads
from vgen.generators.joint_block import JointBlock
from vgen.generators.joint_text import JointText
from vgen.generators.latent_head import LatentEmbedding, LatentHead
from vgen.generators.places import Located, Places, mask_padding, values_at
from vgen.generators.plan_check import check_fits
from vgen.generators.readout import Readout
from vgen.layers import fused
from vgen.layers.attention import View, additive_mask
from vgen.layers.cache import KVCache
from vgen.layers.handoff import Relay
from vgen.layers.mlp import swiglu_width
from vgen.layers.modulation import Modulation, Modulator
from vgen.layers.norm import NormKind, make_norm
from vgen.layers.rope import Placeless, RopeKind, Rotary, extrapolated_rope_table, rotate
from vgen.schedules.plan import Feed, Forward, Plan, Read


class Transformer(nn.Module):
    """Transformer over the slots of a plan, which says what each of them sees.

    Args:
        vocab_size: number of token ids V; 0 for continuous tokens.
        grid: token grid the position tables are built for.
        condition: module that embeds the condition (class labels, text features or token ids). With a ``TextContext``
            every block attends to the text between its attention and its feed-forward layer. With a ``JointText`` the
            condition slots have weights of their own in every block (MM-DiT).
        dim: width of the residual stream.
        depth: number of blocks before the first output head.
        heads: attention heads; must divide dim into an even head width.
        kv_heads: key-value heads for grouped-query attention; null = heads.
        ffn: ``swiglu`` (Llama), ``gelu`` (vision transformers) or ``gelu_tanh``, its tanh approximation (MM-DiT).
        ffn_hidden: inner width of the feed-forward layer; null = 4 dim for gelu, for swiglu 8/3 dim times
            ``ffn_multiplier``, rounded up to a multiple of ``ffn_multiple_of``.
        ffn_multiplier: see ffn_hidden.
        ffn_multiple_of: see ffn_hidden.
        norm: ``rms`` or ``layer``.
        norm_eps: of all norms.
        norm_affine: norms inside the blocks learn a scale.
        norm_position: ``pre`` (norms in front of attention and feed-forward layers) or ``post`` (behind the sums, as in
            BERT).
        embedding_norm: norm of the embedded slots, positions included, in front of token_dropout (BERT).
        final_norm: norms before the output heads.
        final_norm_affine: they learn a scale.
        bias: biases on the projections of attention and feed-forward layers.
        qkv_bias: biases on the query-key-value projection; null = as ``bias``.
        head_bias: biases on the output heads.
        qk_norm: norm of queries and keys over the head width, ``layer`` or ``rms``; null = none.
        rope: rotary code: ``own`` place of a slot, ``own_target`` (half of the head by the place it predicts: DAR's 4D
            code), ``none``.
        rope_base: frequency base of the rotary code.
        rope_placeless: rotation of slots without a place: ``zero`` (published weights) or ``identity``.
        rope_axes: order in which the coordinates share the head, as numbers into (own axes, target axes); null =
            in that order.
        positions: absolute positions: ``none``, learned ones ``own``, ``own_target`` (RAR) and ``tokens`` (own ones of
            the tokens alone), or ``sincos``, a fixed table over the condition slots and then the grid.
        last_position: the last place of the grid has a position; without it (LARP) its token cannot be fed.
        adaln: what modulates the blocks, any of ``condition`` (the class vector), ``step`` (number of the slot, RAR),
            ``direction`` (move to the predicted place, DAR); empty = plain norms.
        directions: moves by number for ``adaln=[direction]``; filled in from the schedule.
        codebook_dim: use the tokenizer's frozen codebook of this code width, projected, as token embedding; null =
            learn a table.
        tied_output: the output head is the table of the token embeddings, without bias (MaskGen).
        latent_head: the tokens are continuous: it draws them, and they are embedded by a projection; null = ids.
        token_dropout: on the embedded sequence.
        token_dropout_on: ``all`` slots or ``tokens`` alone (RandAR).
        attention_dropout: on the attention weights.
        residual_dropout: on the attention output.
        ffn_dropout: on the feed-forward output, with gelu on the inner activations too.
        ffn_inner_dropout: on the inner activations of gelu; null = as ffn_dropout.
        drop_path: stochastic depth of the last block, growing linearly from 0.
        long_skips: every block of the second half first mixes in the output of its mirror image in the first half, by a
            linear layer (U-ViT); needs an odd depth, the block in the middle stands alone.
        num_readouts: output heads; each after the first sits behind one more block chained to the previous one. Taken
            from the plan (``Plan.num_heads``).
        num_learned: learned slot embeddings. Taken from the plan (``Plan.num_learned``).
        position_queries: one learned vector that asks for a token by the rotary code of its place (RandAR). Taken from
            the plan (``Plan.has_queries``).
        mask_token: one more token embedding, for tokens that are not known. Taken from the plan (``Plan.masking``).
        gradient_checkpointing: recompute blocks in the backward pass.

    Attributes:
        fused: decoding passes use kernels of their own; set by :meth:`fuse_decoding`.
        residual_dtype: of the residual stream in training; None = that of the weights.
        cache_dtype: of the keys and values that decoding keeps; None = that of the weights.

    Raises:
        UserError: for sizes or switches that do not fit together.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        grid: Sequence[int],
        condition: ClassCondition | TextCondition | TextContext | TokenCondition | JointText,
        dim: int,
        depth: int,
        heads: int,
        kv_heads: int | None = None,
        ffn: FeedForwardKind = "swiglu",
        ffn_hidden: int | None = None,
        ffn_multiplier: float | None = None,
        ffn_multiple_of: int = 256,
        norm: NormKind = "rms",
        norm_eps: float = 1e-5,
        norm_affine: bool = True,
        norm_position: Literal["pre", "post"] = "pre",
        embedding_norm: bool = False,
        final_norm: bool = True,
        final_norm_affine: bool = True,
        bias: bool = False,
        qkv_bias: bool | None = None,
        head_bias: bool = False,
        qk_norm: NormKind | None = None,
        rope: RopeKind = "own",
        rope_base: float = 10000.0,
        rope_placeless: Placeless = "zero",
        rope_axes: Sequence[int] | None = None,
        positions: Literal["none", "own", "own_target", "tokens", "sincos"] = "none",
        last_position: bool = True,
        adaln: Sequence[AdaLNInput] = (),
        directions: Sequence[Sequence[int]] | None = None,
        codebook_dim: int | None = None,
        tied_output: bool = False,
        latent_head: LatentHead | None = None,
        token_dropout: float = 0.1,
        token_dropout_on: Literal["all", "tokens"] = "all",
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        ffn_inner_dropout: float | None = None,
        drop_path: float = 0.0,
        long_skips: bool = False,
        num_readouts: int = 1,
        num_learned: int = 0,
        position_queries: bool = False,
        mask_token: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if dim % heads or (dim // heads) % 2:
            raise UserError(f"generator.dim={dim} must be generator.heads={heads} times an even head width")
        if heads % kv_heads:
            raise UserError(f"generator.kv_heads={kv_heads} must divide generator.heads={heads}")
        check_choices(
            ffn=(ffn, ("swiglu", "gelu", "gelu_tanh")),
            norm=(norm, ("rms", "layer")),
            norm_position=(norm_position, ("pre", "post")),
            qk_norm=(qk_norm, (None, "rms", "layer")),
            rope=(rope, ("own", "own_target", "none")),
            rope_placeless=(rope_placeless, ("zero", "identity")),
            positions=(positions, ("none", "own", "own_target", "tokens", "sincos")),
            token_dropout_on=(token_dropout_on, ("all", "tokens")),
        )
        self.vocab_size, self.grid = vocab_size, tuple(grid)
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, dim // heads
        self.num_readouts, self.num_learned = num_readouts, num_learned
        self.gradient_checkpointing = gradient_checkpointing
        self.fused = False
        self.told_target = positions == "own_target" or rope == "own_target"
        self.adaln = check_adaln(adaln, condition, directions)
        check_combinations(
            (long_skips and depth % 2 == 0, f"generator.long_skips needs an odd generator.depth, not {depth}"),
            (long_skips and num_readouts > 1, "generator.long_skips goes with schedules of one output head only"),
            (
                norm_position == "post" and isinstance(condition, TextContext),
                "generator.norm_position=post has no place for cross-attention; set it to pre",
            ),
            (norm_position == "post" and self.adaln, "generator.adaln modulates pre-norm blocks; leave it empty"),
            (ffn == "swiglu" and ffn_inner_dropout is not None, "generator.ffn_inner_dropout goes with ffn=gelu only"),
            *refused_streams(condition, self.adaln, rope=rope, norm_position=norm_position, long_skips=long_skips),
            *refused_outputs(
                latent_head,
                vocab_size=vocab_size,
                tied_output=tied_output,
                codebook_dim=codebook_dim,
                head_bias=head_bias,
                num_readouts=num_readouts,
            ),
            (embedding_norm and token_dropout_on != "all", "generator.embedding_norm needs token_dropout_on=all"),
            (mask_token and codebook_dim is not None, "a codebook has no mask token: set generator.codebook_dim=null"),
        )
        if ffn_hidden is None:
            swiglu = swiglu_width(dim, multiplier=ffn_multiplier, multiple_of=ffn_multiple_of)
            ffn_hidden = swiglu if ffn == "swiglu" else 4 * dim
        shape = BlockShape(
            dim=dim,
            heads=heads,
            kv_heads=kv_heads,
            ffn=ffn,
            ffn_hidden=ffn_hidden,
            norm=norm,
            norm_eps=norm_eps,
            norm_affine=norm_affine,
            norm_position=norm_position,
            bias=bias,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            modulated=bool(self.adaln),
            attention_dropout=attention_dropout,
            residual_dropout=residual_dropout,
            ffn_dropout=ffn_dropout,
            ffn_inner_dropout=ffn_inner_dropout,
            cross_attention=isinstance(condition, TextContext),
        )
        if isinstance(condition, TokenCondition) and (
            positions == "none" or (rope != "none" and rope_placeless == "zero")
        ):
            raise UserError(
                "a condition of tokens is told its order by generator.positions=own, and its keys must not be zeroed: "
                "set generator.rope=none or generator.rope_placeless=identity"
            )
        blocks, tokens, slots = depth + num_readouts - 1, prod(self.grid), condition.num_slots + prod(self.grid)
        self.condition = condition
        self.tok_embeddings: nn.Embedding | CodebookEmbedding | LatentEmbedding
        if latent_head is not None:
            self.tok_embeddings = LatentEmbedding(channels=latent_head.channels, dim=dim)
        elif codebook_dim is None:
            self.tok_embeddings = nn.Embedding(vocab_size + mask_token, dim)
        else:
            self.tok_embeddings = CodebookEmbedding(vocab_size=vocab_size, codebook_dim=codebook_dim, dim=dim)
        self.learned_embeddings = nn.Embedding(num_learned, dim) if num_learned else None
        self.query_embedding = nn.Parameter(torch.randn(1, dim) * 0.02) if position_queries else None
        self.places = (
            None
            if positions == "none"
            else Positions(
                num_condition=0 if positions == "tokens" else condition.num_slots,
                num_tokens=tokens,
                dim=dim,
                target=positions == "own_target",
                last=last_position,
                fixed=positions == "sincos",
            )
        )
        self.steps = nn.Embedding(slots, dim) if "step" in self.adaln else None
        self.directions = Directions(grid=self.grid, moves=directions, dim=dim) if directions is not None else None
        self.mask_token = mask_token
        self.embedding_norm = make_norm(norm, dim, eps=norm_eps) if embedding_norm else None
        self.token_dropout = nn.Dropout(token_dropout)
        self.token_dropout_on = token_dropout_on
        self.first_skip = blocks // 2 + 1 if long_skips else blocks
        joint = condition.num_slots if isinstance(condition, JointText) else 0
        self.layers = nn.ModuleList(
            JointBlock(shape, num_text=joint, drop_path=rate, last=index == blocks - 1)
            if joint
            else Block(shape, drop_path=rate, skip=index >= self.first_skip)
            for index, rate in enumerate(torch.linspace(0, drop_path, blocks, device="cpu").tolist())
        )
        self.norms = nn.ModuleList(
            make_norm(norm, dim, eps=norm_eps, affine=final_norm_affine) if final_norm else nn.Identity()
            for _ in range(num_readouts)
        )
        self.modulations = nn.ModuleList(Modulation(dim=dim, parts=2) for _ in range(num_readouts if self.adaln else 0))
        self.latent_head = latent_head
        own_heads = 0 if tied_output or latent_head is not None else num_readouts
        outputs = [nn.Linear(dim, vocab_size, bias=head_bias) for _ in range(own_heads)]
        self.outputs = nn.ModuleList(outputs)
        self.rotary = Rotary(
            kind=rope,
            grid=self.grid,
            head_dim=self.head_dim,
            base=rope_base,
            placeless=rope_placeless,
            axes=rope_axes,
        )
        if position_queries and rope != "own":
            raise UserError("this schedule's position queries are told their place by generator.rope=own")
        self.apply(_initialise)
        if latent_head is not None:
            latent_head.initialise()
        elif outputs:
            nn.init.zeros_(outputs[0].weight)
        self.residual_dtype: torch.dtype | None = None
        self.cache_dtype: torch.dtype | None = None
        self._compiled_group: Callable[..., Tensor] | None = None
        self._group = 1

    def compile_blocks(self, *, group: int = 1) -> None:
        """Compile the blocks for training, in place: names of parameters stay, and one compilation serves all groups.

        Args:
            group: consecutive blocks compiled as one; more take longer to compile, fewer calls to run, and let the
                compiler join what two blocks do to the residual stream. Ignored with long skips.

        Raises:
            UserError: for a group below 1, or of several blocks that are to be recomputed one by one.
        """
        if group < 1:
            raise UserError(f"blocks are compiled in groups of at least 1, not {group}")
        if group > 1 and self.gradient_checkpointing:
            raise UserError("generator.gradient_checkpointing recomputes single blocks; compile them one by one")
        for block in self.layers:
            block.compile()
        if group > 1 and self.first_skip == len(self.layers):
            self._group, self._compiled_group = group, torch.compile(_run_group)

    def fuse_decoding(self, enabled: bool = True) -> None:
        """Have decoding passes run by the kernels of :mod:`vgen.layers.fused`, where those know the block, or not.

        Sums of bfloat16 products round differently in them. The first call moves weights, see :meth:`Block.fuse`.
        """
        self.fused = enabled
        following = {id(block): other for block, other in pairwise(self.layers)}
        for block in self._blocks():
            other = following.get(id(block))
            block.fuse(enabled, other if isinstance(other, Block) else None)

    def fuse_rotation(self) -> None:
        """Have training cut and rotate the projections of every block by the kernels of :mod:`vgen.layers.rotation`.

        Raises:
            UserError: if the network norms queries and keys or does not rotate them.
        """
        layers = [block.attention for block in self._blocks()]
        if not layers or self.rotary.kind == "none" or any(layer.q_norm is not None for layer in layers):
            raise UserError(
                "task.fused_rotation=true knows networks with rotary codes and without norms of queries and keys; set "
                "it to false for this one"
            )
        for layer in layers:
            layer.fused_rotation = True

    @property
    def num_condition(self) -> int:
        """Condition slots at the start of every sequence."""
        return self.condition.num_slots

    @property
    def num_context(self) -> int:
        """Features beside the sequence that every block attends to."""
        return self.condition.num_features if isinstance(self.condition, TextContext) else 0

    @property
    def works_on_host(self) -> bool:
        """Whether decoding looks something up on the host, captions or a diffusion's tables: no graph can hold that."""
        return isinstance(self.condition, TextContext | JointText) or self.latent_head is not None

    @property
    def drops_attention(self) -> bool:
        """Whether training drops attention weights."""
        return any(block.attention.dropout > 0 for block in self._blocks())

    def _blocks(self) -> list[Block]:
        return [block for block in self.layers.modules() if isinstance(block, Block)]

    @property
    def unknown_id(self) -> int:
        """Id to feed where a token is not known: the mask token, or any id where the slot is not read."""
        return self.vocab_size if self.mask_token else 0

    def unknown(self, batch: int, count: int, device: torch.device) -> Tensor:
        """Tokens none of which is known: ids -1, int64 [batch, count], or latents of NaN, float32 [batch, count, C]."""
        if self.latent_head is None:
            return torch.full((batch, count), -1, dtype=torch.int64, device=device)
        return torch.full((batch, count, self.latent_head.channels), torch.nan, device=device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.layers.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.layers.parameters()).device

    def check_plan(self, plan: Plan) -> None:
        """Refuse a plan this network was not built for.

        Raises:
            UserError: naming the first requirement of the plan that the network does not meet.
        """
        check_fits(self, plan)

    def embed_condition(self, condition: Tensor, drop: Tensor | None = None) -> Tensor:
        """Embed what the samples are conditioned on.

        Args:
            condition: class labels or caption numbers int64 [B], text features [B, num_condition, caption_dim], or
                token ids int64 [B, num_condition - 1].
            drop: bool [B], samples that get the null condition instead.

        Returns:
            [B, num_condition, dim].
        """
        if isinstance(self.condition, TokenCondition):
            return self.condition(self.tok_embeddings(condition), drop)
        return self.condition(condition, drop)

    def locate(self, feed: Feed, order: Tensor, mask: Tensor | None = None) -> Located:
        """What the slots of a feed take from their places and a mask bool [F, P]; arguments as in :meth:`enter`."""
        places = Places.of(feed, order)
        bias = None if mask is None else additive_mask(mask, self.dtype)
        return Located(places, self.rotary(places.own, places.target), bias)

    def enter(
        self,
        ids: Tensor,
        condition: Tensor,
        feed: Feed,
        order: Tensor,
        *,
        blank: Tensor | None = None,
        located: Located | None = None,
        **seen: Any,
    ) -> tuple[Tensor, View]:
        """Embedded slots [B, F, dim] and what the blocks need to know of them.

        Args:
            ids: int64 [B, N], tokens in order indices; continuous ones float32 [B, N, C], NaN where not known.
            condition: [B, num_condition + num_context, dim], embedded condition.
            feed: which slots.
            order: int64 [N] or [B, N], raster position of every order index.
            blank: bool [B, N], order indices whose tokens are embedded as zeros; null = none.
            located: what :meth:`locate` gives, if it is known already.
            seen: further fields of :class:`vgen.layers.attention.View`: visibility and cache.
        """
        places, rope, _ = located or self.locate(feed, order)
        modulator = self.modulator(condition, feed, places)
        if self.num_context:
            context = condition[:, self.num_condition :]
            visible = context.ne(0).any(-1)
            # An empty caption is all padding; attending to its zeros changes nothing, to nothing would be undefined.
            seen["context_mask"] = (visible | ~visible.any(-1, keepdim=True))[:, None, None]
            # Passes after the one that feeds the condition find its keys and values in the cache.
            seen["context"] = context if len(feed.conditions) else None
        relay = Relay()
        x = self.embed(ids, condition, feed, places, blank, relay)
        if self.residual_dtype is not None and self._trains():
            x = x.to(self.residual_dtype)
        return x, View(rope=rope, modulator=modulator, relay=relay, **seen)

    def embed(
        self,
        ids: Tensor,
        condition: Tensor,
        feed: Feed,
        places: Places,
        blank: Tensor | None = None,
        relay: Relay | None = None,
    ) -> Tensor:
        """Embed the slots of a feed.

        Args:
            ids: int64 [B, N], tokens in order indices.
            condition: [B, num_condition, dim], embedded condition.
            feed: which slots.
            places: their raster positions.
            blank: bool [B, N], order indices whose tokens are embedded as zeros; null = none.
            relay: takes what a kernel leaves for the first block.

        Returns:
            [B, F, dim], after token dropout.
        """
        everywhere = self.token_dropout_on == "all"
        parts = []
        if len(feed.conditions):
            parts.append(condition[:, feed.conditions])
        if feed.tokens.numel():
            tokens = self._vectors(ids, feed, relay)
            if blank is not None:
                tokens = tokens.masked_fill(values_at(blank, feed.tokens, feed.token_start)[..., None], 0.0)
            parts.append(tokens if everywhere else self.token_dropout(tokens))
        if len(feed.learned):
            assert self.learned_embeddings is not None
            parts.append(self.learned_embeddings(feed.learned).expand(len(ids), -1, -1))
        if len(feed.queries):
            parts.append(self.ask(places.queries).expand(len(ids), -1, -1))
        out = parts[0] if len(parts) == 1 else torch.cat([part.type_as(parts[0]) for part in parts], dim=1)
        if feed.arrange is not None:
            out = out[:, feed.arrange]
        if everywhere and self.embedding_norm is None:
            out = self.token_dropout(out)
        if self.places is not None:
            out = out + self.places(feed.slots, places.own, places.target, prod(self.grid))
        return out if self.embedding_norm is None else self.token_dropout(self.embedding_norm(out))

    def _vectors(self, ids: Tensor, feed: Feed, relay: Relay | None) -> Tensor:
        """Vectors of the tokens that a feed holds, [B, number of tokens, dim]."""
        table, first = self.tok_embeddings, self.layers[0]
        if not self.fused or relay is None or not isinstance(table, nn.Embedding) or not fused.can_embed(table):
            return table(values_at(ids, feed.tokens, feed.token_start))
        norm = first.attention_norm if isinstance(first, Block) and first.fusible else None
        vectors, relay.last = fused.embed(table.weight, ids, feed.tokens, following=norm)
        return vectors

    def ask(self, positions: Tensor) -> Tensor:
        """Query embeddings [1 or B, n, dim] of raster positions int64 [n] or [B, n]: one vector, rotated per head."""
        assert self.query_embedding is not None
        rope = self.rotary(positions, positions)
        assert rope is not None
        vector = self.query_embedding.view(1, self.heads, 1, self.head_dim)
        return rotate(vector, rope).transpose(1, 2).flatten(2)

    def modulator(self, condition: Tensor, feed: Feed, places: Places) -> Modulator | None:
        """Conditioning vectors of the slots of a feed; arguments as in :meth:`embed`."""
        if not self.adaln:
            return None
        vectors, index = condition.new_zeros(1, 1, self.dim), None
        if "condition" in self.adaln:
            vectors = vectors + condition[:, -1:]
        if self.steps is not None:
            vectors = vectors + self.steps(feed.slots)
        if self.directions is not None:
            numbers = self.directions.number(places.own, places.target)
            known = self.directions.embeddings.num_embeddings
            if self.steps is None and numbers.shape[-1] > known:
                vectors, index = vectors + self.directions.embeddings.weight, numbers
            else:
                vectors = vectors + self.directions.embeddings(numbers)
        return Modulator(vectors, index)

    def run_blocks(self, x: Tensor, view: View) -> list[Tensor]:
        """Run all blocks.

        Args:
            x: [B, F, dim], embedded slots.
            view: visibility, rotary rows and cache.

        Returns:
            One hidden state [B, F, dim] per output head.
        """
        hidden: list[Tensor] = []
        earlier: list[Tensor] = []
        # Only training calls the compiled blocks: decoding changes shapes at every pass, and each would compile again.
        training = self._trains()
        first_readout, first = len(self.layers) - self.num_readouts, 0
        if training and self._compiled_group is not None:
            blocks = list(self.layers)
            while first + self._group <= first_readout + 1:
                x = self._compiled_group(blocks[first : first + self._group], x, view)
                first += self._group
            if first == first_readout + 1:
                hidden.append(x)
        for index, block in enumerate(self.layers[first:], first):
            skipped = earlier.pop() if index >= self.first_skip else None
            if not training:
                x = block.forward(x, view, index, skipped)
            elif self.gradient_checkpointing:
                x = checkpoint(block, x, view, index, skipped, use_reentrant=False)
            else:
                x = block(x, view, index, skipped)
            if index < len(self.layers) - self.first_skip:
                earlier.append(x)
            if index >= first_readout:
                hidden.append(x)
        return hidden

    def _trains(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def read(self, hidden: list[Tensor], read: Read, num_targets: int, modulator: Modulator | None) -> Tensor:
        """Logits of the targets, see :meth:`vgen.generators.heads.Heads.logits`.

        Args:
            hidden: one [B, F, dim] per head, from :meth:`run_blocks`.
            read: where to read.
            num_targets: number of targets D.
            modulator: conditioning of the slots, from :meth:`modulator`.
        """
        return self._heads().logits(hidden, read, num_targets, modulator)

    def _heads(self) -> Heads:
        tied = None
        if not self.outputs and self.latent_head is None:
            assert isinstance(self.tok_embeddings, nn.Embedding)
            tied = self.tok_embeddings.weight[: self.vocab_size]
        return Heads(self.norms, self.modulations, self.outputs, tied, by_kernels=self.fused)

    def logits(
        self,
        ids: Tensor,
        condition: Tensor,
        plan: Plan,
        *,
        order: Tensor | None = None,
        drop: Tensor | None = None,
        padding: Tensor | None = None,
        flex: bool = False,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced logits of every token.

        Args:
            ids: int64 [B, N], raster order; continuous tokens float32 [B, N, C].
            condition: see :meth:`embed_condition`.
            plan: decode order.
            order: int64 [B, N], raster position of every order index, for plans of any order; null = the plan's own.
            drop: bool [B], samples whose condition is replaced by the null condition.
            padding: bool [B, num_condition], True = valid condition slot; null = all valid.
            flex: FlexAttention under the plan's block mask instead of a dense mask; neither padding nor dropout of
                attention weights can be had with it.
            hidden: bool [B, N], raster order, tokens replaced by the mask token, for plans with one; null = none.

        Returns:
            float32 [B, N, V], raster order; the logits of a token depend only on the condition and on tokens decided in
            earlier passes, for plans with a mask token on all tokens that are not hidden. For continuous tokens the
            states [B, N, dim] that the latent head draws them from.
        """
        states, read, modulator = self._teach(
            ids, condition, plan, order=order, drop=drop, padding=padding, flex=flex, hidden=hidden
        )
        return self.read(states, read, plan.num_tokens, modulator).float()

    def readout(self, ids: Tensor, condition: Tensor, plan: Plan, **options: Any) -> Readout:
        """What the logits of :meth:`logits` are the product of, for losses that never hold all of them.

        Args:
            ids: see :meth:`logits`.
            condition: likewise.
            plan: likewise.
            options: likewise.
        """
        states, read, modulator = self._teach(ids, condition, plan, **options)
        return self._heads().readout(states, read, plan.num_tokens, modulator)

    def _teach(
        self,
        ids: Tensor,
        condition: Tensor,
        plan: Plan,
        *,
        order: Tensor | None = None,
        drop: Tensor | None = None,
        padding: Tensor | None = None,
        flex: bool = False,
        hidden: Tensor | None = None,
    ) -> tuple[list[Tensor], Read, Modulator | None]:
        """Hidden states [B, S, dim] of the teacher-forced pass, where to read them, and what modulates the heads."""
        tensors = plan.on(ids.device)
        if hidden is not None:
            assert self.mask_token, "only a network with a mask token can hide tokens"
            ids = ids.masked_fill(hidden, self.unknown_id) if ids.dim() == 2 else _blanked(ids, hidden)
        assert order is None or plan.any_order, "an order per sample needs a plan of any order"
        if order is None:
            order, read, ordered = tensors.order, tensors.read, ids[:, tensors.order]
        else:
            read, ordered = tensors.read_in_order.reordered(order.argsort(1)), ids.gather(1, order)
        embedded = self.embed_condition(condition, drop)
        x, view = self.enter(ordered, embedded, tensors.feed, order, causal=tensors.causal, mask=tensors.mask)
        if flex:
            assert padding is None, "the block mask is the plan's own"
            view = replace(view, causal=False, mask=None, blocks=tensors.blocks)
        if padding is not None:
            assert not self.num_context, "a text context marks its padding by zeros"
            slots = torch.arange(plan.num_slots, device=ids.device)
            visible = slots[None, :] <= slots[:, None]
            if not tensors.causal:
                visible = torch.ones_like(visible) if tensors.mask is None else tensors.mask
            view = replace(view, causal=False, mask=mask_padding(visible, padding, slots))
        return self.run_blocks(x, view), read, view.modulator

    def step(
        self,
        ids: Tensor,
        condition: Tensor,
        forward: Forward,
        order: Tensor,
        cache: KVCache | None,
        *,
        padding: Tensor | None = None,
        blank: Tensor | None = None,
        located: Located | None = None,
    ) -> Tensor:
        """One pass of the decoding loop.

        Args:
            ids: int64 [B, N], tokens decided so far, in order indices; the rest is not read.
            condition: [B, num_condition, dim], embedded condition.
            forward: the pass, on the device of the network.
            order: int64 [N] or [B, N], raster position of every order index.
            cache: keys and values of earlier passes, written to; None for plans that need none.
            padding: bool [B, num_condition], True = valid condition slot; null = all valid.
            blank: bool [B, N], order indices whose tokens are embedded as zeros; null = none.
            located: what :meth:`locate` gives for the pass, if it is known already.

        Returns:
            [B, D, V], logits of the targets of the pass, or their states [B, D, dim] for continuous tokens, in the
            dtype of the products or float32.
        """
        mask = forward.mask
        if padding is not None:
            assert not self.num_context, "a text context marks its padding by zeros"
            visible = mask
            if visible is None:
                visible = torch.ones(forward.rows.shape[-1], forward.prefix, dtype=torch.bool, device=ids.device)
            mask = mask_padding(visible, padding, forward.rows)
        elif located is not None and located.bias is not None:
            mask = located.bias
        if mask is not None and self.fused and mask.dtype == torch.bool:
            # The attention kernel of decoding takes summands only.
            mask = additive_mask(mask, self.dtype)
        x, view = self.enter(
            ids,
            condition,
            forward.feed,
            order,
            blank=blank,
            located=located,
            causal=False,
            mask=mask,
            cache=cache,
            rows=forward.rows,
            row_start=forward.row_start,
            prefix=forward.prefix,
            settled=forward.settled,
        )
        return self.read(self.run_blocks(x, view), forward.read, forward.targets.shape[-1], view.modulator)

    def refined(self, factor: int, *, boundary: int) -> "Transformer":
        """The same weights on a grid ``factor`` times finer along every axis (RandAR section 8).

        Args:
            factor: how many times finer, >= 2.
            boundary: rotary frequencies per axis that keep counting cells; the others are squeezed.

        Returns:
            A network that shares all parameters with this one.

        Raises:
            UserError: if places enter this network in another way than the rotary code of the slots' own places.
        """
        if (
            self.rotary.kind != "own"
            or self.places is not None
            or self.steps is not None
            or self.directions is not None
        ):
            raise UserError("only a generator whose places enter by rotary codes alone can be used on a finer grid")
        fine = copy.copy(self)
        fine._modules = dict(self._modules)
        fine.grid = tuple(side * factor for side in self.grid)
        fine.rotary = copy.copy(self.rotary)
        fine.rotary._buffers = dict(self.rotary._buffers)
        table = extrapolated_rope_table(self.grid, self.head_dim, factor=factor, boundary=boundary)
        fine.rotary.table = table.to(self.rotary.table.device)
        return fine

    def new_cache(self, batch: int, rows: int) -> KVCache:
        """A cache for ``batch`` sequences of ``rows`` slots, not written yet."""
        return KVCache(
            layers=len(self.layers),
            batch=batch,
            heads=self.kv_heads,
            rows=rows,
            head_dim=self.head_dim,
            device=self.device,
            dtype=self.dtype,
            context_heads=self.heads,
            context_rows=self.num_context,
            row_dtype=self.cache_dtype,
        )


def _blanked(latents: Tensor, hidden: Tensor) -> Tensor:
    """Latents [B, N, C], NaN where hidden, bool [B, N]."""
    return latents.masked_fill(hidden[..., None], torch.nan)


def _run_group(blocks: list[nn.Module], x: Tensor, view: View) -> Tensor:
    """Run consecutive blocks in training, where their numbers do not matter: there is no cache."""
    for block in blocks:
        x = block.forward(x, view, 0)
    return x


def _initialise(module: nn.Module) -> None:
    """Normal(0, 0.02) for every linear layer and embedding (LlamaGen section 3); modulations start at zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Modulation):
        nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(module.linear.bias)
