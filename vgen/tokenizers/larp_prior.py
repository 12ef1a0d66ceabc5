"""LARP's learned autoregressive prior: a small causal transformer trained along with the tokenizer (arXiv 2410.21264).

It only shapes the token space, so that the sequence is easy to predict from left to right; decoding does not use it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.layers.attention import attend
from vgen.tokenizers.larp_transformer import BLOCK_EPS


class _CausalAttention(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.key, self.query, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.resid_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        out = attend(query, key, value, causal=True, mask=None, dropout=dropout)
        return self.resid_drop(self.proj(out.transpose(1, 2).flatten(2)))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.ln1 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.attn = _CausalAttention(dim, heads, dropout)
        self.ln2 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


@dataclass(frozen=True)
class PriorOutput:
    """What the prior says about a batch of token sequences.

    Attributes:
        loss: mean cross-entropy of tokens 1..N-1 over all rounds, float32 scalar.
        logits: one [B, N - 1, K] per round, the last one first trained with sampled inputs.
        prediction: unit vectors [B, N, C] of the last round; position 0 is the input token itself.
    """

    loss: Tensor
    logits: tuple[Tensor, ...]
    prediction: Tensor


class LARPPrior(nn.Module):
    """Predicts each code from those before it, by the cosine of a predicted vector with the codebook.

    Args:
        num_tokens: length N of the sequence.
        codebook_dim: length C of a code.
        dim: width.
        depth: number of blocks.
        heads: attention heads; must divide dim.
        dropout: on embeddings, attention weights and residual branches.
        rounds: passes per batch; each after the first replaces some inputs by tokens sampled from the one before
            (scheduled sampling).
        sampled_share: largest share of inputs replaced.
        sampled_rise: part of training over which the share rises linearly to its largest value.
        temperature: of the logits.

    Raises:
        UserError: if an option is out of range.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        codebook_dim: int,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        dropout: float = 0.1,
        rounds: int = 2,
        sampled_share: float = 0.5,
        sampled_rise: float = 0.3,
        temperature: float = 1.0,
    ):
        super().__init__()
        if dim % heads:
            raise UserError(f"tokenizer.prior.dim={dim} must be a multiple of tokenizer.prior.heads={heads}")
        if rounds < 1 or depth < 1:
            raise UserError("tokenizer.prior.rounds and depth must be at least 1")
        if not 0 <= sampled_share <= 1 or not 0 < sampled_rise <= 1 or not 0 <= dropout < 1 or temperature <= 0:
            raise UserError(
                "tokenizer.prior: sampled_share must lie in [0, 1], sampled_rise in (0, 1], dropout in [0, 1) and "
                "temperature must be positive"
            )
        self.rounds, self.sampled_share, self.sampled_rise = rounds, sampled_share, sampled_rise
        self.temperature = temperature
        self.pos_emb = nn.Parameter(torch.zeros(1, num_tokens, dim))
        self.input_proj = nn.Linear(codebook_dim, dim)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(_Block(dim, heads, dropout) for _ in range(depth)))
        self.ln_f = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.head = nn.Linear(dim, codebook_dim)

    def _predict(self, codes: Tensor) -> Tensor:
        """Codes [B, n, C] to unnormalised predictions of the code after each, [B, n, C]."""
        x = self.input_proj(codes) + self.pos_emb[:, : codes.shape[1]]
        return self.head(self.ln_f(self.blocks(self.drop(x))))

    def forward(self, codes: Tensor, ids: Tensor, codebook: Tensor, *, progress: float) -> PriorOutput:
        """Judge a batch of sequences.

        Args:
            codes: quantized latents with their straight-through gradient, [B, N, C]; the only way for gradients into
                the tokenizer.
            ids: int64 [B, N].
            codebook: unit vectors [K, C]; no gradient reaches them.
            progress: part of training done, 0..1.
        """
        codebook = codebook.detach()
        share = min(self.sampled_share * progress / self.sampled_rise, self.sampled_share)
        inputs, target = codes[:, :-1], ids[:, 1:].flatten()
        rounds: list[Tensor] = []
        losses: list[Tensor] = []
        predicted = inputs
        for number in range(self.rounds):
            if number:
                inputs = self._mix(codes[:, :-1], rounds[-1], codebook, share)
            predicted = F.normalize(self._predict(inputs).float(), dim=-1)
            with torch.autocast(predicted.device.type, enabled=False):
                rounds.append(predicted @ codebook.T / self.temperature)
            losses.append(F.cross_entropy(rounds[-1].flatten(0, 1), target))
        first = F.normalize(codes[:, :1].float(), dim=-1)
        return PriorOutput(torch.stack(losses).mean(), tuple(rounds), torch.cat([first, predicted], dim=1))

    @torch.no_grad()
    def _sampled(self, logits: Tensor, codebook: Tensor) -> Tensor:
        """Codes drawn from logits [B, n, K], [B, n, C]."""
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view(logits.shape[:2])
        return F.embedding(drawn, codebook)

    def _mix(self, inputs: Tensor, logits: Tensor, codebook: Tensor, share: float) -> Tensor:
        """Replace inputs [B, N - 1, C], all but the first, by sampled codes where one mask for the batch says so."""
        if share == 0 or inputs.shape[1] < 2:
            return inputs
        sampled = self._sampled(logits[:, :-1], codebook).to(inputs.dtype)
        replaced = torch.rand(1, sampled.shape[1], 1, device=inputs.device) < share
        return torch.cat([inputs[:, :1], torch.where(replaced, sampled, inputs[:, 1:])], dim=1)
