"""Vector quantization by nearest neighbour with a straight-through gradient (van den Oord et al., 2017).

With l2-normalised codes as in ViT-VQGAN (Yu et al., 2021) and LlamaGen (arXiv 2406.06525).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import UserError

# Numbers of the distance matrix held at once while searching (64 MiB in float32).
SEARCH_BUDGET = 2**24


@dataclass(frozen=True)
class Quantized:
    """Result of quantizing a latent map.

    Attributes:
        latent: [B, C, h, w], the chosen codes with the straight-through gradient, in the dtype of the input.
        ids: int64 [B, h*w] in raster order.
        losses: float32 scalars ``vq``, ``commit`` and ``entropy``, already weighted.
    """

    latent: Tensor
    ids: Tensor
    losses: dict[str, Tensor]


class VectorQuantizer(nn.Module):
    """Codebook, search, losses and usage statistics.

    All arithmetic is float32, whatever the autocast state or the dtype of the surrounding network, because the nearest
    of thousands of unit vectors is decided by differences bfloat16 cannot hold.

    Args:
        codebook_size: number of codes K.
        codebook_dim: length C of a code.
        l2_normalize: compare and emit unit vectors; the stored codebook itself stays free.
        commitment_weight: weight (beta) of the term that pulls the encoder to its codes.
        entropy_weight: weight of the entropy term (0 = off; when on, the whole distance matrix is kept for gradients).
        entropy_temperature: temperature of the soft assignment inside the entropy term.
        usage_window: number of most recent training tokens over which `usage` is counted.

    Raises:
        UserError: if a size or weight is out of range.
    """

    def __init__(
        self,
        *,
        codebook_size: int,
        codebook_dim: int,
        l2_normalize: bool = True,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        usage_window: int = 65536,
    ):
        super().__init__()
        for key, size in (
            ("codebook_size", codebook_size),
            ("codebook_dim", codebook_dim),
            ("usage_window", usage_window),
        ):
            if size < 1:
                raise UserError(f"{key}={size} must be at least 1")
        for key, weight in (("commitment_weight", commitment_weight), ("entropy_weight", entropy_weight)):
            if weight < 0:
                raise UserError(f"{key}={weight} must not be negative; use 0 to switch the term off")
        if entropy_temperature <= 0:
            raise UserError(f"entropy_temperature={entropy_temperature} must be positive (LlamaGen uses 0.01)")
        self.codebook_size = codebook_size
        self.l2_normalize = l2_normalize
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)
        if l2_normalize:
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)
        self.codebook_used: Tensor
        # Saved, so that a resumed run reports the same usage; the name is that of LlamaGen's queue.
        self.register_buffer("codebook_used", torch.zeros(usage_window, dtype=torch.int32))

    @property
    def codebook(self) -> Tensor:
        """Codes as the decoder sees them, float32 [K, C]."""
        # A view of its own: training may move the codes to other memory before the backward pass reads these.
        codes = self.embedding.weight.view_as(self.embedding.weight).float()
        return F.normalize(codes, dim=-1) if self.l2_normalize else codes

    def rows(self, latent: Tensor) -> Tensor:
        """Latent map [B, C, h, w] to the float32 vectors that are compared with the codebook, [B*h*w, C]."""
        flat = latent.float().permute(0, 2, 3, 1).flatten(0, 2)
        return F.normalize(flat, dim=-1) if self.l2_normalize else flat

    @staticmethod
    def distances(rows: Tensor, codes: Tensor) -> Tensor:
        """Squared distances [M, K] between rows [M, C] and codes [K, C].

        The rounding order is LlamaGen's, so that near ties fall as they did there.
        """
        squares = rows.square().sum(1, keepdim=True) + codes.square().sum(1)
        return torch.sub(squares, rows @ codes.T, alpha=2)

    @torch.no_grad()
    def nearest(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Index of the nearest code of every row, int64 [M]; the lowest index wins a tie."""
        step = max(1, SEARCH_BUDGET // self.codebook_size)
        return torch.cat([self.distances(part, codes).argmin(1) for part in rows.split(step)])

    def assign(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Index of the code that represents each row in the forward pass, int64 [M]."""
        return self.nearest(rows, codes)

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes of ids int64 [...], float32 [..., C]."""
        return F.embedding(ids, self.codebook)

    def usage(self) -> Tensor:
        """Share of the codebook seen in the window, float32 scalar.

        As in LlamaGen the window starts filled with zeros, so code 0 counts as seen until the window is full.
        """
        seen = torch.zeros(self.codebook_size, device=self.codebook_used.device)
        return seen.index_fill_(0, self.codebook_used.long(), 1.0).mean()

    @torch.no_grad()
    def _record(self, ids: Tensor) -> None:
        window = self.codebook_used
        recent = torch.cat([window, ids.to(window.dtype)])[-window.numel() :]
        window.copy_(recent)

    def entropies(self, distances: Tensor) -> tuple[Tensor, Tensor]:
        """Mean entropy of the soft assignment by distances [M, K], and the entropy of its mean (after MAGVIT-v2)."""
        logits = -distances / self.entropy_temperature
        log_probs = logits.log_softmax(-1)
        probs = log_probs.exp()
        mean = probs.mean(0)
        sample_entropy = -(probs * log_probs).sum(-1).mean()
        return sample_entropy, -(mean * (mean + 1e-5).log()).sum()

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize a latent map; in training mode also record which codes were used.

        Args:
            latent: [B, C, h, w], any floating dtype.
        """
        batch, dim, height, width = latent.shape
        with torch.autocast(latent.device.type, enabled=False):
            rows, codes = self.rows(latent), self.codebook
            if self.entropy_weight > 0:
                distances = self.distances(rows, codes)
                ids = distances.detach().argmin(1)
                sample_entropy, codebook_entropy = self.entropies(distances)
                entropy = self.entropy_weight * (sample_entropy - codebook_entropy)
            else:
                ids = self.assign(rows, codes)
                entropy = rows.new_zeros(())
            chosen = F.embedding(ids, codes)
            losses = {
                "vq": F.mse_loss(chosen, rows.detach()),
                "commit": self.commitment_weight * F.mse_loss(rows, chosen.detach()),
                "entropy": entropy,
            }
            through = rows + (chosen - rows).detach()
        if self.training:
            self._record(ids)
        through = through.view(batch, height, width, dim).permute(0, 3, 1, 2).contiguous()
        return Quantized(through.to(latent.dtype), ids.view(batch, -1), losses)
