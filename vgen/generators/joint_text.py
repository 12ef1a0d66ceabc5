"""Captions as a stream of their own beside the tokens (MM-DiT, arXiv 2403.03206), as MaskGen conditions on them."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.layers.sincos import sincos_1d

ScoreCode = Literal["cos_sin", "sin_cos"]


@dataclass(frozen=True)
class Captions:
    """Text features of numbered captions, computed in advance; the LAST caption is the empty string.

    MaskGen (arXiv 2501.07730) reads OpenAI's CLIP ViT-L/14-336.

    Attributes:
        features: float [n + 1, T, E], of every text token; for MaskGen the hidden states in front of CLIP's last block.
        pooled: float [n + 1, P], of the whole text; for MaskGen the normed and projected feature of the end token.
        decoder_features: float [n + 1, T', E'], for a text-aware tokenizer's decoder; for TA-TiTok the normed output of
            CLIP's last block. None = the decoder sees no text.
        scores: float [n + 1], aesthetic score of the picture wanted, about 0 to 10; None = the network's default.
    """

    features: Tensor
    pooled: Tensor
    decoder_features: Tensor | None = None
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: for tensors of unfitting shapes.
        """
        wanted = {"features": 3, "pooled": 2, "decoder_features": 3, "scores": 1}
        for name, axes in wanted.items():
            value = getattr(self, name)
            if value is None:
                continue
            if value.dim() != axes or not value.is_floating_point() or len(value) != len(self.features):
                raise UserError(
                    f"captions: {name} of shape {list(value.shape)} must be float with {axes} axes and one row for "
                    f"each of the {len(self.features)} rows of features"
                )
        if len(self.features) < 2:
            raise UserError("captions: the last row stands for the empty string, so there must be at least two")

    def __len__(self) -> int:
        """Number of captions n, the empty string not counted."""
        return len(self.features) - 1


class JointText(nn.Module):
    """Condition slots with projected text features, and a vector of the whole text that modulates all blocks.

    In the blocks the text has weights of its own and attends jointly with the tokens. The vector is a projection of
    (pooled feature, sinusoidal code of a hundred times an aesthetic score), titok.md section 11. How the code is laid
    out and the score asked for where captions state none are inferred: the sheet does not say.

    Captions are given by number, which take the place of class labels; the number of captions stands for the empty
    string, which also replaces dropped captions. Text encoders are not part of vgen.

    Args:
        caption_dim: width E of the text features (CLIP ViT-L/14: 768).
        num_features: features per caption T (77).
        pooled_dim: width P of the pooled feature (768).
        dim: width of the generator.
        score_dim: width of the score's code.
        score: aesthetic score where captions state none.
        score_code: halves of the code, ``cos_sin`` or ``sin_cos``.

    Raises:
        UserError: for an unknown layout or an odd width of the code.
    """

    def __init__(
        self,
        *,
        caption_dim: int,
        num_features: int,
        pooled_dim: int,
        dim: int,
        score_dim: int = 256,
        score: float = 6.5,
        score_code: ScoreCode = "cos_sin",
    ) -> None:
        super().__init__()
        if score_code not in get_args(ScoreCode):
            raise UserError(f"generator.condition.score_code={score_code} is unknown; choose cos_sin or sin_cos")
        if score_dim < 2 or score_dim % 2:
            raise UserError(f"generator.condition.score_dim={score_dim} must be an even number >= 2")
        self.num_slots = num_features
        self.caption_dim, self.pooled_dim, self.score_dim = caption_dim, pooled_dim, score_dim
        self.score, self.score_code = score, score_code
        self.text = nn.Linear(caption_dim, dim)
        self.pooled = nn.Linear(pooled_dim + score_dim, dim)
        # Outside the module tree: captions are data, many of them, and stay on the CPU.
        self._captions: list[Captions] = []

    def attach(self, captions: Captions) -> None:
        """Tell the features of captions 0..n-1 and of the empty string.

        Raises:
            UserError: for features of another shape.
        """
        found = (*captions.features.shape[1:], captions.pooled.shape[1])
        wanted = (self.num_slots, self.caption_dim, self.pooled_dim)
        if found != wanted:
            raise UserError(
                f"captions of (features, their width, pooled width) = {found} do not fit this generator, which takes "
                f"{wanted}"
            )
        self._captions = [captions]

    @property
    def captions(self) -> Captions:
        """What :meth:`attach` was told.

        Raises:
            UserError: if there was nothing.
        """
        if not self._captions:
            raise UserError(
                "this generator is conditioned on text, and text encoders are not part of vgen; give "
                "text_features=<safetensors file with features, pooled (and decoder_features), the last row of each "
                "for the empty string>"
            )
        return self._captions[0]

    @property
    def num_classes(self) -> int:
        """Number of captions attached.

        Raises:
            UserError: if there are none.
        """
        return len(self.captions)

    def forward(self, condition: Tensor, drop: Tensor | None = None) -> Tensor:
        """Embed captions.

        Args:
            condition: int64 [B], numbers of attached captions (their count = the empty string).
            drop: bool [B], captions replaced by the empty string.

        Returns:
            [B, T + 1, dim], the text, then the vector that modulates.
        """
        captions, empty = self.captions, self.num_classes
        rows = condition if drop is None else condition.masked_fill(drop, empty)
        rows = rows.cpu().clamp(max=empty)
        weight = self.text.weight
        features, pooled = (table[rows].to(weight) for table in (captions.features, captions.pooled))
        scores = torch.full((len(rows),), self.score) if captions.scores is None else captions.scores[rows]
        whole = torch.cat([pooled, self._code(scores).to(weight)], dim=1)
        return torch.cat([self.text(features), self.pooled(whole)[:, None]], dim=1)

    def _code(self, scores: Tensor) -> Tensor:
        """Sinusoidal codes float64 [B, score_dim] of scores [B]."""
        sine, cosine = sincos_1d(self.score_dim, 100.0 * scores.double()).chunk(2, dim=1)
        return torch.cat([cosine, sine] if self.score_code == "cos_sin" else [sine, cosine], dim=1)

    def decoder_features(self, condition: Tensor) -> Tensor | None:
        """What a text-aware tokenizer is told of captions int64 [B], float [B, T', E'] on their device, or None."""
        table = self.captions.decoder_features
        return None if table is None else table[condition.cpu().clamp(max=self.num_classes)].to(condition.device)
