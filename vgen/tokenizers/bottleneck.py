"""Bottlenecks of 1D tokenizers beside the plain vector quantizer: clustering codebook and Gaussian latents."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.tokenizers.quantize import SEARCH_BUDGET, Quantized, VectorQuantizer


class ClusteringQuantizer(VectorQuantizer):
    """Vector quantizer that pulls rarely used codes to nearby features (CVQ-VAE, Zheng & Vedaldi, 2023; TA-TiTok).

    After the losses of a training pass are formed, every code k moves to the feature of the global batch nearest to it
    by the share exp(-p_k * K * 10 / (1 - decay) - 0.001), where p_k is the running share of tokens assigned to it:
    codes in use hardly move, unused ones jump. Features are gathered over all processes, so that their codebooks stay
    equal.

    Args:
        decay: of the running shares.
        options: arguments of :class:`vgen.tokenizers.quantize.VectorQuantizer`.

    Raises:
        UserError: if a size or weight is out of range.
    """

    def __init__(self, *, decay: float = 0.99, **options):
        super().__init__(**options)
        if not 0.0 < decay < 1.0:
            raise UserError(f"clustering decay={decay} must lie between 0 and 1")
        self.decay = decay
        self.embed_prob: Tensor
        self.register_buffer("embed_prob", torch.zeros(self.codebook_size))

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize a latent map [B, C, h, w]; in training mode also move the codes."""
        quantized = super().forward(latent)
        if self.training and self.embedding.weight.requires_grad:
            features = latent.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
            self._move(_gathered(features), _gathered(quantized.ids.flatten()))
        return quantized

    @torch.no_grad()
    def _move(self, features: Tensor, ids: Tensor) -> None:
        """Update shares and codes from features [M, C] and the codes [M] they were assigned to."""
        with torch.autocast(features.device.type, enabled=False):
            counts = torch.zeros_like(self.embed_prob).scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))
            self.embed_prob.lerp_(counts / len(ids), 1.0 - self.decay)
            share = (-self.embed_prob * self.codebook_size * 10.0 / (1.0 - self.decay) - 1e-3).exp()[:, None]
            rows = torch.nn.functional.normalize(features, dim=-1) if self.l2_normalize else features
            anchors = features[self._nearest_rows(rows, self.codebook)]
            weight = self.embedding.weight
            # A new tensor, because the graph of this pass may still hold the old one.
            weight.data = weight.data * (1.0 - share) + anchors.to(weight.dtype) * share

    def _nearest_rows(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Index of the row nearest to every code, int64 [K]."""
        step = max(1, SEARCH_BUDGET // len(rows))
        return torch.cat([self.distances(rows, part).argmin(0) for part in codes.split(step)])


def _gathered(tensor: Tensor) -> Tensor:
    """Concatenation over processes along the first axis, whose length is the same everywhere."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


@dataclass(frozen=True)
class GaussianLatent:
    """Diagonal normal distributions over latents.

    Attributes:
        mean: float32 [B, C, 1, K].
        logvar: float32 [B, C, 1, K], logarithm of the variance, within [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Mean + deviation * noise; standard normal noise of the same shape is drawn where none is given."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal in nats, summed over channels, [B, K]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum((1, 2))


class GaussianBottleneck(nn.Module):
    """Reads channels as mean and log-variance (first and second half).

    Args:
        kl_weight: weight of the divergence, summed over tokens and averaged over images.

    Raises:
        UserError: for a negative weight.
    """

    def __init__(self, *, kl_weight: float = 1e-6):
        super().__init__()
        if kl_weight < 0:
            raise UserError(f"tokenizer.kl_weight={kl_weight} must not be negative; use 0 to switch the term off")
        self.kl_weight = kl_weight

    def forward(self, parameters: Tensor) -> GaussianLatent:
        """Distributions of parameters [B, 2 C, 1, K]."""
        mean, logvar = parameters.float().chunk(2, dim=1)
        return GaussianLatent(mean, logvar.clamp(-30.0, 20.0))

    def losses(self, latent: GaussianLatent) -> dict[str, Tensor]:
        """The weighted divergence as ``kl``."""
        return {"kl": self.kl_weight * latent.kl().sum(1).mean()}
