"""What a generator is conditioned on, as embeddings for the condition slots of a plan."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgen.errors import UserError


class ClassCondition(nn.Module):
    """One slot with a learned vector per class; the extra last row is the null class (LlamaGen section 3.2).

    Args:
        num_classes: number of real classes.
        dim: width of the generator.
        num_prefix: learned slots in front of the class (one in RAR, arXiv 2411.00776).
    """

    def __init__(self, *, num_classes: int, dim: int, num_prefix: int = 0) -> None:
        super().__init__()
        self.num_classes, self.num_slots = num_classes, num_prefix + 1
        self.embedding_table = nn.Embedding(num_classes + 1, dim)
        self.prefix = nn.Parameter(torch.zeros(num_prefix, dim)) if num_prefix else None

    def forward(self, condition: Tensor, drop: Tensor | None = None) -> Tensor:
        """Embed labels.

        Args:
            condition: int64 [B], 0..num_classes (num_classes = null).
            drop: bool [B], samples that get the null class instead.

        Returns:
            [B, num_slots, dim], the class last.
        """
        if drop is not None:
            condition = condition.masked_fill(drop, self.num_classes)
        embedded = self.embedding_table(condition).unsqueeze(1)
        if self.prefix is None:
            return embedded
        return torch.cat([self.prefix.expand(len(embedded), -1, -1), embedded], dim=1)


class TextCondition(nn.Module):
    """Projected text features, one slot per feature (LlamaGen section 3.2).

    Args:
        caption_dim: width of the text features (2048 for FLAN-T5-XL).
        num_slots: number of features per caption, left padded (120).
        dim: width of the generator.
    """

    uncond_embedding: Tensor

    def __init__(self, *, caption_dim: int, num_slots: int, dim: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.fc1 = nn.Linear(caption_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        self.register_buffer("uncond_embedding", torch.randn(num_slots, caption_dim) / caption_dim**0.5)

    def forward(self, condition: Tensor, drop: Tensor | None = None) -> Tensor:
        """Embed captions.

        Args:
            condition: float [B, num_slots, caption_dim], zeros where padded.
            drop: bool [B], captions replaced as a whole by the fixed null features.

        Returns:
            [B, num_slots, dim].
        """
        condition = condition.to(self.fc1.weight.dtype)
        if drop is not None:
            condition = torch.where(drop[:, None, None], self.uncond_embedding.to(condition.dtype), condition)
        return self.fc2(F.gelu(self.fc1(condition), approximate="tanh"))


class TextContext(nn.Module):
    """Text features that every block attends to, behind one learned slot that starts the sequence.

    FlexTok's text-conditional generators (arXiv 2502.13967) as the sheet's section 7 reads their sizes. A feature of
    zeros is padding: the projection has no bias, so it stays zero and is not attended.

    Captions are given as features, or by number once :meth:`attach` has told the features of every caption; then they
    take the place of class labels everywhere.

    Args:
        caption_dim: width of the text features, such as 2048 for T5-XL.
        num_features: features per caption T.
        dim: width of the generator.
    """

    num_slots = 1

    def __init__(self, *, caption_dim: int, num_features: int, dim: int) -> None:
        super().__init__()
        self.caption_dim, self.num_features = caption_dim, num_features
        self.start = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.null = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.fc1 = nn.Linear(caption_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        # Outside the module tree: captions are data, many of them, and stay on the CPU.
        self._captions: list[Tensor] = []

    def attach(self, features: Tensor) -> None:
        """Tell the features of captions 0..n-1.

        Args:
            features: float [n, T, caption_dim], zeros where padded.

        Raises:
            UserError: for another shape.
        """
        if features.dim() != 3 or features.shape[1:] != (self.num_features, self.caption_dim):
            raise UserError(
                f"text features of shape {list(features.shape)} do not fit this generator, which takes [captions, "
                f"{self.num_features}, {self.caption_dim}]"
            )
        self._captions = [features]

    @property
    def num_classes(self) -> int:
        """Number of captions attached.

        Raises:
            UserError: if there are none.
        """
        if not self._captions:
            raise UserError("this generator is conditioned on text; give text_features=<safetensors file>")
        return len(self._captions[0])

    def forward(self, condition: Tensor, drop: Tensor | None = None) -> Tensor:
        """Embed captions.

        Args:
            condition: float [B, T, caption_dim], or numbers of attached captions int64 [B] (their count = null).
            drop: bool [B], captions replaced by the null vector.

        Returns:
            [B, 1 + T, dim], the learned slot, then the context.
        """
        if not condition.is_floating_point():
            dropped = condition >= self.num_classes
            drop = dropped if drop is None else drop | dropped
            features = self._captions[0]
            condition = features[condition.cpu().clamp(max=len(features) - 1)].to(condition.device)
        context = self.fc2(F.gelu(self.fc1(condition.to(self.fc1.weight.dtype)), approximate="tanh"))
        if drop is not None:
            context = torch.where(drop[:, None, None], self.null.to(context.dtype), context)
        return torch.cat([self.start.to(context.dtype).expand(len(context), 1, -1), context], dim=1)


class TokenCondition(nn.Module):
    """Tokens in front of the tokens that are generated, then a learned separator (LARP's frame prediction).

    The tokens share the embedding of the generated ones; their positions are the generator's.

    Args:
        num_tokens: tokens of the condition.
        dim: width of the generator.
        droppable: learn a vector that replaces every token of a dropped condition, for guidance; LARP has none.
    """

    def __init__(self, *, num_tokens: int, dim: int, droppable: bool = False) -> None:
        super().__init__()
        self.num_slots = num_tokens + 1
        self.separator = nn.Parameter(torch.randn(dim) * 0.02)
        self.null = nn.Parameter(torch.randn(dim) * 0.02) if droppable else None

    def forward(self, embedded: Tensor, drop: Tensor | None = None) -> Tensor:
        """Append the separator.

        Args:
            embedded: [B, num_tokens, dim], embedded tokens.
            drop: bool [B], conditions that are replaced by the null vector.

        Returns:
            [B, num_slots, dim].

        Raises:
            UserError: if a condition is to be dropped and there is no null vector.
        """
        if drop is not None and (self.null is not None or bool(drop.any())):
            if self.null is None:
                raise UserError(
                    "this generator has learned no null condition, so it cannot be guided; set "
                    "sampling.guidance.scale=1 (and task.condition_dropout=0 in training), or train one with "
                    "generator.condition.droppable=true"
                )
            embedded = torch.where(drop[:, None, None], self.null.to(embedded.dtype), embedded)
        separator = self.separator.to(embedded.dtype).expand(len(embedded), 1, -1)
        return torch.cat([embedded, separator], dim=1)
