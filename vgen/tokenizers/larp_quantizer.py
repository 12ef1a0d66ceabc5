"""LARP's stochastic vector quantizer (arXiv 2410.21264, section 3.2)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.tokenizers.quantize import VectorQuantizer


class StochasticQuantizer(VectorQuantizer):
    """Draws each code with probability softmax(cosine / temperature) while training; takes the best one otherwise.

    Args:
        temperature: of the draw; 0 always takes the nearest code.
        shared: arguments of :class:`vgen.tokenizers.quantize.VectorQuantizer`.

    Raises:
        UserError: if drawing is combined with free codes or with the entropy loss, which are not defined for it.
    """

    def __init__(self, *, temperature: float, **shared: Any):
        super().__init__(**shared)
        if temperature < 0:
            raise UserError(f"tokenizer.stochastic_temperature={temperature} must not be negative (LARP: 0.03)")
        if temperature and not self.l2_normalize:
            raise UserError("tokenizer.stochastic_temperature needs tokenizer.l2_normalize=true; or set it to 0")
        if temperature and self.entropy_weight:
            raise UserError("tokenizer.entropy_weight needs tokenizer.stochastic_temperature=0")
        self.temperature = temperature
        nn.init.kaiming_uniform_(self.embedding.weight)

    def probabilities(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Distribution over codes [M, K] of unit rows [M, C]."""
        return (rows @ codes.T / self.temperature).softmax(-1)

    @torch.no_grad()
    def draw(self, rows: Tensor, codes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One code per row, int64 [M], drawn as in training."""
        return torch.multinomial(self.probabilities(rows, codes), 1, generator=generator).squeeze(1)

    def assign(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Codes of rows, int64 [M]: drawn while training, the nearest in evaluation."""
        if self.training and self.temperature > 0:
            return self.draw(rows, codes)
        return self.nearest(rows, codes)

    def sequence(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Quantize a sequence of latents.

        Args:
            latents: [B, N, C].

        Returns:
            Codes [B, N, C] with the straight-through gradient, ids int64 [B, N], weighted losses.
        """
        quantized = self(latents.transpose(1, 2).unsqueeze(3))
        return quantized.latent.squeeze(3).transpose(1, 2), quantized.ids, quantized.losses

    def unit_codebook(self) -> Tensor:
        """Codes scaled to unit length, float32 [K, C]."""
        return F.normalize(self.embedding.weight.float(), dim=-1)
