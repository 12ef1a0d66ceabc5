"""Picture grids during training; clips are shown as strips of frames."""

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.strategies import FSDPStrategy
from torch import Tensor

from vgen.media import strips
from vgen.pixels import save_grid, to_uint8
from vgen.sampling.first_frames import FromClips
from vgen.sampling.pipeline import Pipeline
from vgen.sampling.settings import Sampling
from vgen.training.callbacks import Metrics, StepCallback
from vgen.training.codebook_module import CodebookModule
from vgen.training.flextok_module import FlexTokModule
from vgen.training.generator_module import GeneratorModule
from vgen.training.module import TrainingModule

_READABLE = 512  # pixels; smaller grids are magnified
_MOST_CLASSES = 10


class Pictures(StepCallback):
    """Every few steps: reconstructions below their originals, or one column of samples per class.

    The averaged weights are shown where there are any. The first process makes the grid while the others wait.

    Args:
        folder: where PNG files go.
        every: optimizer steps between two grids.
        count: originals per grid, or samples per class.
        originals: pixels [count, 3, H, W] or [count, 3, T, H, W] in [-1, 1] (tokenizers; frame prediction goes on from
            their first frames).
        sampling: how to sample (generators).
        metrics: whose clock is stopped meanwhile.
    """

    def __init__(
        self, folder: Path, *, every: int, count: int, originals: Tensor | None, sampling: Sampling, metrics: Metrics
    ) -> None:
        super().__init__()
        self.folder = folder
        self.every = every
        self.count = count
        self.originals = originals
        self.sampling = sampling
        self.metrics = metrics

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, batch: dict) -> None:
        """Write a grid if it is due."""
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        if isinstance(trainer.strategy, FSDPStrategy):
            return  # a single process holds a part of every weight only
        began = time.monotonic()
        if trainer.is_global_zero:
            grid, columns = self.draw(module)
            scale = max(1, _READABLE // (grid.shape[-1] * columns))
            path = save_grid(grid, self.folder / f"step-{step:08d}.png", columns=columns, scale=scale)
            self._log(trainer, path, step)
        trainer.strategy.barrier()
        self.metrics.pause(time.monotonic() - began)

    def draw(self, module: TrainingModule) -> tuple[Tensor, int]:
        """Pictures uint8 [n, 3, H, W] and how many stand in a row."""
        training = module.network.training
        module.network.eval()
        try:
            with torch.no_grad(), module.averaged_weights():
                if isinstance(module, CodebookModule | FlexTokModule):
                    return self._reconstruct(module)
                assert isinstance(module, GeneratorModule)
                return self._sample(module)
        finally:
            module.network.train(training)

    def _reconstruct(self, module: CodebookModule | FlexTokModule) -> tuple[Tensor, int]:
        assert self.originals is not None
        originals = self.originals.to(module.device)
        rebuilt = module.reconstruct(originals)
        if originals.dim() == 5:
            return strips(torch.stack([to_uint8(originals), to_uint8(rebuilt)], dim=1).flatten(0, 1))
        return torch.cat([to_uint8(originals), to_uint8(rebuilt)]), len(originals)

    def _sample(self, module: GeneratorModule) -> tuple[Tensor, int]:
        parts: dict[str, Any] = {"generator": module.generator, "tokenizer": module.tokenizer, "plan": module.plan}
        if module.given_frames is not None:
            return self._predict(module, parts)
        pipeline = Pipeline(engine="eager", **parts)
        columns = min(_MOST_CLASSES, pipeline.num_classes)
        chosen = torch.arange(columns) * pipeline.num_classes // columns
        if module.condition_dropout == 1:
            chosen = torch.full((columns,), pipeline.num_classes)
        labels = chosen.repeat(self.count)
        pictures = pipeline.generate(labels, torch.arange(len(labels)), self.sampling)
        return strips(pictures) if pictures.dim() == 5 else (pictures, columns)

    def _predict(self, module: GeneratorModule, parts: dict[str, Any]) -> tuple[Tensor, int]:
        """Every clip above how the generator goes on from its first frames."""
        assert self.originals is not None
        clips = to_uint8(self.originals)
        index = torch.arange(len(clips))
        start = FromClips(clips, torch.zeros_like(index))
        pipeline = Pipeline(**parts, start=start, given_frames=module.given_frames)
        predicted = pipeline.generate(torch.zeros_like(index), index, self.sampling).cpu()
        return strips(torch.stack([clips, predicted], dim=1).flatten(0, 1))

    @staticmethod
    def _log(trainer: pl.Trainer, path: Path, step: int) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                from PIL import Image
                from torchvision.transforms.functional import pil_to_tensor

                logger.experiment.add_image("pictures", pil_to_tensor(Image.open(path)), step)
            elif isinstance(logger, WandbLogger):
                logger.log_image("pictures", [str(path)], step=step)
