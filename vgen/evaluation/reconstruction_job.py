"""Score what a tokenizer keeps of a picture."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.evaluation.collect import PictureBatch, read_batches
from vgen.evaluation.features import Extractor
from vgen.evaluation.frechet import FeatureStatistics, frechet_distance
from vgen.evaluation.pixel_metrics import PSNR_CAP, SSIM_WINDOW, psnr, ssim
from vgen.evaluation.readers import Pictures
from vgen.evaluation.settings import RECONSTRUCTION_METRICS, EvaluationSettings
from vgen.pixels import from_uint8, save_grid, to_uint8
from vgen.processes import Processes
from vgen.tokenizers.base import Tokenizer

PICTURES_SHOWN = 16


@dataclass
class ReconstructionJob:
    """Reconstructions against their originals.

    Attributes:
        tokenizer: network under test, in evaluation mode.
        originals: pictures to encode and decode.
        settings: metrics and conventions.
        extractor: feature extractor, if a Frechet distance is asked for.
        device: where the tokenizer runs.
        picture: where to write originals above reconstructions.
        warnings: remarks for the report.
        skipped: metrics that do not apply, with the reason; filled when the job is made.
    """

    tokenizer: Tokenizer
    originals: Pictures
    settings: EvaluationSettings
    extractor: Extractor | None
    device: torch.device
    picture: Path
    warnings: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        others = [m for m in self.settings.metrics if m not in RECONSTRUCTION_METRICS]
        self.skipped = dict.fromkeys(others, "needs job=samples")
        self.active = [m for m in self.settings.metrics if m in RECONSTRUCTION_METRICS]
        if "codebook" in self.active and not self.tokenizer.codebook_size:
            self.active.remove("codebook")
            self.skipped["codebook"] = "the latents are continuous"
        if not self.active:
            raise UserError(
                f"evaluation.metrics: none applies to a tokenizer; choose from {', '.join(RECONSTRUCTION_METRICS)}"
            )
        height, width = self.originals.read([0]).shape[2:]
        size = self.tokenizer.image_size
        if (height, width) != (size, size):
            raise UserError(
                f"the tokenizer was made for {size}x{size} pictures but {self.originals.name} has {width}x{height}; "
                f"set the image size of the data group"
            )
        if "ssim" in self.active and size < SSIM_WINDOW:
            raise UserError(f"metric ssim needs pictures of at least {SSIM_WINDOW}x{SSIM_WINDOW}; remove it")

    def run(self, processes: Processes) -> dict:
        """Compute the metrics; the result is complete on every process.

        Returns:
            The parts of the report that this job knows.
        """
        total = len(self.originals)
        if total < processes.world_size:
            raise UserError(f"{total} pictures cannot be shared by {processes.world_size} processes; start fewer")
        tokenizer, extractor = self.tokenizer.to(self.device).eval(), self.extractor
        codes = torch.zeros(tokenizer.codebook_size, dtype=torch.int64, device=self.device)
        state = torch.zeros(4, dtype=torch.float64)  # pictures, sum of PSNR, exact copies, sum of SSIM
        fits = [FeatureStatistics(extractor.dim, extractor.device) for _ in range(2)] if extractor else []
        rows: list[list[Tensor]] = [[], [], []]  # index, features of reconstructions, features of originals
        saved: dict[str, str] = {}
        for batch in read_batches(
            self.originals, batch_size=self.settings.batch_size, processes=processes, description="reconstructions"
        ):
            made = self._reconstruct(batch, codes, state)
            if extractor is not None:
                self._add_features(extractor, (made, batch.pictures), batch.index, fits, rows)
            if processes.rank == 0 and not saved:
                saved["originals above, reconstructions below"] = str(self._save(batch.pictures, made))
        state, codes = processes.sum(state), processes.sum(codes)
        if int(state[0]) != total:
            raise UserError(f"{int(state[0])} pictures were scored but {total} were asked for")
        values = self._pixel_values(state) | self._code_values(codes)
        if extractor is not None:
            values |= self._distance(extractor, fits, rows, processes)
        return {
            "metrics": values,
            "n_samples": total,
            "n_reference": total,
            "label_histogram": None,
            "dataset": {"reference": self.originals.name, "resolution": [self.tokenizer.image_size] * 2},
            "tokenizer": {"grid": list(tokenizer.grid), "codebook_size": tokenizer.codebook_size},
            "source": "memory",
            "sampling": None,
            "pictures_saved": saved,
        }

    def _reconstruct(self, batch: PictureBatch, codes: Tensor, state: Tensor) -> Tensor:
        """Encode and decode a batch, adding to the code counts and to the sums in ``state``."""
        pixels = from_uint8(batch.pictures.to(self.device))
        with torch.inference_mode():
            if len(codes):
                ids = self.tokenizer.encode(pixels)
                codes += torch.bincount(ids.flatten(), minlength=len(codes))
                made = to_uint8(self.tokenizer.decode(ids)).cpu()
            else:
                # Continuous latents have no ids to count.
                made = to_uint8(self.tokenizer.reconstruct(pixels)).cpu()
        quality = psnr(made, batch.pictures)
        likeness = ssim(made, batch.pictures).sum() if "ssim" in self.active else torch.zeros(())
        state += torch.stack(
            [torch.tensor(float(len(made))), quality.sum(), (quality == PSNR_CAP).sum(), likeness]
        ).double()
        return made

    def small(self, extractor: Extractor) -> bool:
        """Whether there are too few pictures for a covariance of full rank."""
        return len(self.originals) <= extractor.dim

    def _add_features(
        self,
        extractor: Extractor,
        pair: tuple[Tensor, Tensor],
        index: Tensor,
        fits: list[FeatureStatistics],
        rows: list[list[Tensor]],
    ) -> None:
        rows[0].append(index)
        for pictures, fit, kept in zip(pair, fits, rows[1:], strict=True):
            features = extractor(pictures)[0]
            fit.update(features)
            if self.small(extractor):
                kept.append(features.cpu())

    def _save(self, originals: Tensor, made: Tensor) -> Path:
        shown = min(PICTURES_SHOWN, len(made))
        pictures = torch.cat([originals[:shown], made[:shown]])
        return save_grid(pictures, self.picture, columns=shown, scale=max(1, 64 // pictures.shape[-1]))

    def _pixel_values(self, state: Tensor) -> dict[str, float]:
        total, quality, copies, likeness = state.tolist()
        values: dict[str, float] = {}
        if "psnr" in self.active:
            values["psnr"] = quality / total
            if copies:
                self.warnings.append(f"{int(copies)} pictures came back exactly and count as {PSNR_CAP:g} dB")
        if "ssim" in self.active:
            values["ssim"] = likeness / total
        return values

    def _code_values(self, codes: Tensor) -> dict[str, float]:
        if "codebook" not in self.active:
            return {}
        share = codes.double() / codes.sum()
        entropy = float(torch.special.entr(share).sum())
        return {
            "codebook_usage": float((codes > 0).double().mean()),
            "codebook_entropy_bits": entropy / math.log(2),
            "codebook_perplexity": math.exp(entropy),
        }

    def _distance(
        self, extractor: Extractor, fits: list[FeatureStatistics], rows: list[list[Tensor]], processes: Processes
    ) -> dict[str, float]:
        small = self.small(extractor)
        index = torch.cat(rows[0])
        gaussians = []
        for fit, kept in zip(fits, rows[1:], strict=True):
            features = processes.gather(index, torch.cat(kept)) if small else None
            fit.reduce(processes)
            gaussians.append(fit.gaussian(features if processes.rank == 0 else None))
        if small:
            self.warnings.append(
                f"{len(self.originals)} pictures are fewer than the {extractor.dim} feature dimensions need: the "
                f"covariance is singular and the Frechet distance strongly biased"
            )
        if processes.rank != 0:
            return {}
        return {extractor.score_name("rfd"): frechet_distance(*gaussians)}
