"""The one decoder-only transformer: it knows slots, not decode orders.

With the ``raster`` plan and the default switches this is LlamaGen's GPT (arXiv 2406.06525, section 2.2).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgen.errors import UserError
from vgen.generators.conditioning import ClassCondition, TextCondition
from vgen.layers.attention import Attention, View
from vgen.layers.cache import KVCache
from vgen.layers.drop_path import DropPath
from vgen.layers.mlp import SwiGLU, swiglu_width
from vgen.layers.norm import RMSNorm
from vgen.layers.rope import Placeless, rope_table
from vgen.schedules.plan import Feed, Forward, Plan, Read


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm x), then x + ffn(norm x)."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_heads: int,
        ffn_hidden: int,
        norm_eps: float,
        attention_dropout: float,
        residual_dropout: float,
        ffn_dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim, eps=norm_eps)
        self.attention = Attention(
            dim=dim, heads=heads, kv_heads=kv_heads, dropout=attention_dropout, residual_dropout=residual_dropout
        )
        self.ffn_norm = RMSNorm(dim, eps=norm_eps)
        self.feed_forward = SwiGLU(dim=dim, hidden=ffn_hidden, dropout=ffn_dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, view: View, layer: int) -> Tensor:
        """Map x [B, F, dim]; ``layer`` indexes the cache in the view."""
        x = x + self.drop_path(self.attention(self.attention_norm(x), view, layer))
        return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))


class Transformer(nn.Module):
    """Decoder-only transformer over the slots of a plan.

    Args:
        vocab_size: number of token ids V.
        grid: token grid the rotary table is built for.
        condition: module that embeds the condition (class labels or text features).
        dim: width of the residual stream.
        depth: number of blocks before the first output head.
        heads: attention heads; must divide dim into an even head width.
        kv_heads: key-value heads for grouped-query attention; null = heads.
        ffn_hidden: inner width of the feed-forward layer; null = 8/3 dim times ``ffn_multiplier``, rounded up to a
            multiple of ``ffn_multiple_of``.
        ffn_multiplier: see ffn_hidden.
        ffn_multiple_of: see ffn_hidden.
        norm_eps: of the RMS norms.
        rope_base: frequency base of the rotary code.
        rope_placeless: rotation of slots without a place: ``zero`` (published weights) or ``identity``.
        token_dropout: on the embedded sequence, condition included.
        attention_dropout: on the attention weights.
        residual_dropout: on the attention output.
        ffn_dropout: on the feed-forward output.
        drop_path: stochastic depth of the last block, growing linearly from 0.
        num_readouts: output heads; each after the first sits behind one more block chained to the previous one. Taken
            from the plan (``Plan.num_heads``).
        num_learned: learned slot embeddings. Taken from the plan (``Plan.num_learned``).
        gradient_checkpointing: recompute blocks in the backward pass.

    Raises:
        UserError: for sizes that do not fit together.
    """

    rope: Tensor

    def __init__(
        self,
        *,
        vocab_size: int,
        grid: Sequence[int],
        condition: ClassCondition | TextCondition,
        dim: int,
        depth: int,
        heads: int,
        kv_heads: int | None = None,
        ffn_hidden: int | None = None,
        ffn_multiplier: float | None = None,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        rope_placeless: Placeless = "zero",
        token_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        drop_path: float = 0.0,
        num_readouts: int = 1,
        num_learned: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if dim % heads or (dim // heads) % 2:
            raise UserError(f"generator.dim={dim} must be generator.heads={heads} times an even head width")
        if heads % kv_heads:
            raise UserError(f"generator.kv_heads={kv_heads} must divide generator.heads={heads}")
        if rope_placeless not in ("zero", "identity"):
            raise UserError(f"generator.rope_placeless={rope_placeless} must be zero or identity")
        self.vocab_size, self.grid = vocab_size, tuple(grid)
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, dim // heads
        self.num_readouts, self.num_learned = num_readouts, num_learned
        self.gradient_checkpointing = gradient_checkpointing
        hidden = ffn_hidden or swiglu_width(dim, multiplier=ffn_multiplier, multiple_of=ffn_multiple_of)
        blocks = depth + num_readouts - 1
        self.condition = condition
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.learned_embeddings = nn.Embedding(num_learned, dim) if num_learned else None
        self.token_dropout = nn.Dropout(token_dropout)
        self.layers = nn.ModuleList(
            Block(
                dim=dim,
                heads=heads,
                kv_heads=kv_heads,
                ffn_hidden=hidden,
                norm_eps=norm_eps,
                attention_dropout=attention_dropout,
                residual_dropout=residual_dropout,
                ffn_dropout=ffn_dropout,
                drop_path=rate,
            )
            for rate in torch.linspace(0, drop_path, blocks, device="cpu").tolist()
        )
        self.norms = nn.ModuleList(RMSNorm(dim, eps=norm_eps) for _ in range(num_readouts))
        outputs = [nn.Linear(dim, vocab_size, bias=False) for _ in range(num_readouts)]
        self.outputs = nn.ModuleList(outputs)
        self.register_buffer(
            "rope",
            rope_table(self.grid, self.head_dim, base=rope_base, placeless=rope_placeless),
            persistent=False,
        )
        self.apply(_initialise)
        nn.init.zeros_(outputs[0].weight)

    def compile_blocks(self) -> None:
        """Compile every block for training, in place: names of parameters stay, and one compilation serves all."""
        for block in self.layers:
            block.compile()

    @property
    def num_condition(self) -> int:
        """Condition slots at the start of every sequence."""
        return self.condition.num_slots

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.tok_embeddings.weight.dtype

    def check_plan(self, plan: Plan) -> None:
        """Refuse a plan this network was not built for.

        Raises:
            UserError: naming the first requirement of the plan that the network does not meet.
        """
        if plan.grid != self.grid:
            raise UserError(f"schedule '{plan.name}' covers the grid {plan.grid}, the generator the grid {self.grid}")
        mine = (self.num_condition, self.num_readouts, self.num_learned)
        needs = (plan.num_condition, plan.num_heads, plan.num_learned)
        if mine != needs:
            raise UserError(
                f"schedule '{plan.name}' needs (condition slots, output heads, learned embeddings) = {needs}, the "
                f"generator has {mine}: it was trained for another schedule; choose that one"
            )

    def embed(self, ids: Tensor, condition: Tensor, feed: Feed) -> Tensor:
        """Embed the slots of a feed.

        Args:
            ids: int64 [B, N], tokens in order indices.
            condition: [B, num_condition, dim], embedded condition.
            feed: which slots.

        Returns:
            [B, F, dim], after token dropout.
        """
        parts = []
        if len(feed.conditions):
            parts.append(condition[:, feed.conditions])
        if len(feed.tokens):
            parts.append(self.tok_embeddings(ids[:, feed.tokens]))
        if len(feed.learned):
            assert self.learned_embeddings is not None
            parts.append(self.learned_embeddings(feed.learned).expand(len(ids), -1, -1))
        out = parts[0] if len(parts) == 1 else torch.cat([part.type_as(parts[0]) for part in parts], dim=1)
        if feed.arrange is not None:
            out = out[:, feed.arrange]
        return self.token_dropout(out)

    def rotary(self, feed: Feed, order: Tensor) -> Tensor:
        """Rotary rows of the slots of a feed, float32 [F, head_dim / 2, 2].

        Args:
            feed: which slots.
            order: int64 [N], raster position of every order index.
        """
        places = torch.cat([order, order.new_full((1,), len(order))])
        return self.rope[places[feed.position]]

    def run_blocks(self, x: Tensor, view: View) -> list[Tensor]:
        """Run all blocks.

        Args:
            x: [B, F, dim], embedded slots.
            view: visibility, rotary rows and cache.

        Returns:
            One hidden state [B, F, dim] per output head.
        """
        hidden = []
        # Only training calls the compiled blocks: decoding changes shapes at every pass, and each would compile again.
        training = self.training and torch.is_grad_enabled()
        first_readout = len(self.layers) - self.num_readouts
        for index, block in enumerate(self.layers):
            if not training:
                x = block.forward(x, view, index)
            elif self.gradient_checkpointing:
                x = checkpoint(block, x, view, index, use_reentrant=False)
            else:
                x = block(x, view, index)
            if index >= first_readout:
                hidden.append(x)
        return hidden

    def read(self, hidden: list[Tensor], read: Read, num_targets: int) -> Tensor:
        """Logits of the targets, the mean over their reads.

        Args:
            hidden: one [B, F, dim] per head, from :meth:`run_blocks`.
            read: where to read.
            num_targets: number of targets D.

        Returns:
            float32 [B, D, V].
        """
        if read.simple:
            return self.outputs[0](self.norms[0](hidden[0][:, read.slots[0]])).float()
        total = torch.zeros(len(hidden[0]), num_targets, self.vocab_size, device=hidden[0].device)
        for head, state in enumerate(hidden):
            if len(read.slots[head]):
                logits = self.outputs[head](self.norms[head](state[:, read.slots[head]])).float()
                total = total.index_add(1, read.targets[head], logits * read.weights[head][:, None])
        return total

    def logits(
        self,
        ids: Tensor,
        condition: Tensor,
        plan: Plan,
        *,
        drop: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced logits of every token.

        Args:
            ids: int64 [B, N], raster order.
            condition: class labels int64 [B] or text features [B, num_condition, caption_dim].
            plan: decode order.
            drop: bool [B], samples whose condition is replaced by the null condition.
            padding: bool [B, num_condition], True = valid condition slot; null = all valid.

        Returns:
            float32 [B, N, V], raster order; the logits of a token depend only on the condition and on tokens decided in
            earlier passes.
        """
        tensors = plan.on(ids.device)
        x = self.embed(ids[:, tensors.order], self.condition(condition, drop), tensors.feed)
        view = View(causal=tensors.causal, mask=tensors.mask, rope=self.rotary(tensors.feed, tensors.order))
        if padding is not None:
            slots = torch.arange(plan.num_slots, device=ids.device)
            visible = tensors.mask if tensors.mask is not None else slots[None, :] <= slots[:, None]
            view = replace(view, causal=False, mask=mask_padding(visible, padding, slots))
        return self.read(self.run_blocks(x, view), tensors.read, plan.num_tokens)

    def step(
        self,
        ids: Tensor,
        condition: Tensor,
        forward: Forward,
        order: Tensor,
        cache: KVCache,
        *,
        padding: Tensor | None = None,
    ) -> Tensor:
        """One pass of the decoding loop.

        Args:
            ids: int64 [B, N], tokens decided so far, in order indices; the rest is not read.
            condition: [B, num_condition, dim], embedded condition.
            forward: the pass, on the device of the network.
            order: int64 [N], raster position of every order index.
            cache: keys and values of earlier passes; written to.
            padding: bool [B, num_condition], True = valid condition slot; null = all valid.

        Returns:
            float32 [B, D, V], logits of the targets of the pass.
        """
        mask = forward.mask
        if padding is not None:
            visible = mask
            if visible is None:
                visible = torch.ones(len(forward.rows), forward.prefix, dtype=torch.bool, device=ids.device)
            mask = mask_padding(visible, padding, forward.rows)
        view = View(
            causal=False,
            mask=mask,
            rope=self.rotary(forward.feed, order),
            cache=cache,
            rows=forward.rows,
            row_start=forward.row_start,
            prefix=forward.prefix,
        )
        hidden = self.run_blocks(self.embed(ids, condition, forward.feed), view)
        return self.read(hidden, forward.read, len(forward.targets))

    def new_cache(self, batch: int, rows: int) -> KVCache:
        """An empty cache for ``batch`` sequences of ``rows`` slots."""
        return KVCache(
            layers=len(self.layers),
            batch=batch,
            heads=self.kv_heads,
            rows=rows,
            head_dim=self.head_dim,
            device=self.rope.device,
            dtype=self.dtype,
        )


def mask_padding(visible: Tensor, padding: Tensor, rows: Tensor) -> Tensor:
    """Hide padded condition slots, which keep seeing themselves (LlamaGen section 4).

    Args:
        visible: bool [F, P].
        padding: bool [B, C], True = valid; condition slots occupy the first C columns.
        rows: int64 [F], column of each query itself.

    Returns:
        bool [B, 1, F, P].
    """
    columns = torch.ones(len(padding), visible.shape[1], dtype=torch.bool, device=visible.device)
    columns[:, : padding.shape[1]] = padding
    itself = rows[:, None] == torch.arange(visible.shape[1], device=visible.device)
    return ((visible & columns[:, None, :]) | (visible & itself)).unsqueeze(1)


def _initialise(module: nn.Module) -> None:
    """Normal(0, 0.02) for every linear layer and embedding (LlamaGen section 3)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
