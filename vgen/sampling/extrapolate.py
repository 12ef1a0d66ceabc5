"""Pictures larger than a generator was trained for, without training (RandAR section 8)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.generators.transformer import Transformer
from vgen.sampling.decode import Watch
from vgen.sampling.engine import Decoder, Engine
from vgen.sampling.overlap import upload
from vgen.sampling.pipeline import Pipeline
from vgen.sampling.pixels import PixelSettings
from vgen.sampling.settings import Sampling, SpatialGuidance
from vgen.schedules.plan import Plan
from vgen.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Extrapolation:
    """How a finer grid is filled.

    Attributes:
        factor: how many times larger the pictures are, >= 2.
        boundary: rotary frequencies per axis that keep counting cells.
        steps: passes of the finer grid; null = one token per pass.
        spatial: guidance away from half of the coarse tokens.
    """

    factor: int = 2
    boundary: int = 2
    steps: int | None = None
    spatial: SpatialGuidance = field(default_factory=SpatialGuidance)

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: for a value out of range, naming its key.
        """
        if self.factor < 2:
            raise UserError(f"extrapolate.factor={self.factor} must be at least 2")
        if self.boundary < 0:
            raise UserError(f"extrapolate.boundary={self.boundary} must not be negative")


class ExtrapolatingPipeline(Pipeline):
    """Decodes a picture of the trained size, spreads its tokens over a finer grid and decodes the cells between.

    Args:
        generator: network of the trained size, for an order that asks for tokens by position.
        tokenizer: of the larger pictures, with the weights of the trained one.
        plan: order of the coarse grid.
        fine_plan: order of the fine grid, its first tokens given.
        extrapolation: settings.
        picture_size: side in pixels of the pictures; null = as the tokenizer decodes them.
        engine: see :class:`vgen.sampling.pipeline.Pipeline`, like the following.
        pixels: how the tokenizer decodes.

    Raises:
        UserError: if the order cannot ask for tokens by position, or the parts do not fit together.
    """

    def __init__(
        self,
        *,
        generator: Transformer,
        tokenizer: Tokenizer,
        plan: Plan,
        fine_plan: Plan,
        extrapolation: Extrapolation,
        picture_size: int | None = None,
        engine: Engine = "auto",
        pixels: PixelSettings | None = None,
    ) -> None:
        if not (plan.has_queries and fine_plan.has_queries and plan.any_order):
            raise UserError(
                f"extrapolate needs an order that asks for tokens by position, such as randar; this model was trained "
                f"for '{plan.name}'"
            )
        fine = generator.refined(extrapolation.factor, boundary=extrapolation.boundary)
        super().__init__(
            generator=fine,
            tokenizer=tokenizer,
            plan=fine_plan,
            picture_size=picture_size,
            engine=engine,
            pixels=pixels,
        )
        self.coarse, self.coarse_plan, self.extrapolation = generator, plan, extrapolation
        self.coarse_decoder = Decoder(generator, plan, engine=engine)

    def generate_ids(
        self, labels: Tensor, sample_index: Tensor, sampling: Sampling, *, watch: Watch | None = None
    ) -> Tensor:
        """Decode ids int64 [B, N factor^2]; arguments as in the base class, ``watch`` sees the fine grid."""
        self.check_labels(labels)
        labels, sample_index = upload(labels, self.device), upload(sample_index, self.device)
        coarse = self.coarse_decoder(labels, sampling=sampling, sample_index=sample_index)
        ids, known = spread(coarse, self.coarse_plan.grid, self.extrapolation.factor)
        return self.decoder(
            labels,
            sampling=sampling,
            sample_index=sample_index,
            known_ids=ids,
            known=known,
            spatial=self.extrapolation.spatial,
            watch=watch,
        )

    def free_memory(self) -> None:
        """See the base class."""
        super().free_memory()
        self.coarse_decoder.forget()


def spread(ids: Tensor, grid: tuple[int, ...], factor: int) -> tuple[Tensor, Tensor]:
    """Place tokens [B, N] of a grid at every ``factor``-th cell of a finer one.

    Returns:
        Ids int64 [B, N factor^axes], 0 where unknown, and bool of the same shape, True where known.
    """
    fine = tuple(side * factor for side in grid)
    every = (slice(None), *(slice(None, None, factor) for _ in grid))
    spread_ids = ids.new_zeros(len(ids), *fine)
    known = torch.zeros_like(spread_ids, dtype=torch.bool)
    spread_ids[every] = ids.view(-1, *grid)
    known[every] = True
    return spread_ids.flatten(1), known.flatten(1)
