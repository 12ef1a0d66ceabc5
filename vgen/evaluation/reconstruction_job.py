"""Score reconstructions against their originals, one by one: those of a tokenizer, or stored ones."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.evaluation.collect import AnyExtractor, Collected, Fits, PictureBatch, extract, read_batches
from vgen.evaluation.feature_scores import FeatureScores
from vgen.evaluation.metrics import codebook_scores
from vgen.evaluation.pictures import Pictures, RangeGuard
from vgen.evaluation.pixel_metrics import PSNR_CAP, SSIM_CONVENTIONS, psnr, ssim
from vgen.evaluation.quantise import quantise
from vgen.evaluation.real_side import batch_size
from vgen.evaluation.settings import CLIP_METRICS, DISTANCES, RECONSTRUCTION_METRICS, EvaluationSettings
from vgen.losses.perceptual import LPIPS
from vgen.pixels import from_uint8, save_grid
from vgen.processes import Processes
from vgen.tokenizers.base import Tokenizer

ITEMS_SHOWN = 16


def _kind(frames: int | None) -> str:
    return "pictures" if frames is None else f"clips of {frames} frames"


@dataclass
class ReconstructionJob:
    """Reconstructions against their originals.

    Attributes:
        made: tokenizer under test, in evaluation mode, or stored reconstructions in the order of the originals.
        originals: pictures or clips.
        settings: metrics and conventions.
        extractor: feature extractor, if a Frechet distance is asked for.
        lpips: perceptual network, if LPIPS is asked for.
        device: where the networks run.
        picture: where to write originals above reconstructions.
        warnings: remarks for the report.
        skipped: metrics that do not apply, with the reason; filled when the job is made.
    """

    made: Tokenizer | Pictures
    originals: Pictures
    settings: EvaluationSettings
    extractor: AnyExtractor | None
    lpips: LPIPS | None
    device: torch.device
    picture: Path
    warnings: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.skipped = self._inapplicable()
        self.active = [m for m in self.settings.metrics if m not in self.skipped]
        if not self.active:
            raise UserError(
                f"evaluation.metrics: none applies to reconstructions; choose from {', '.join(RECONSTRUCTION_METRICS)}"
            )
        height, width = self.originals.read([0]).shape[-2:]
        self.size = (height, width)
        if isinstance(self.made, Tokenizer):
            side = self.made.image_size
            if self.size != (side, side):
                raise UserError(
                    f"the tokenizer was made for {side}x{side} pictures but {self.originals.name} has "
                    f"{width}x{height}; set the image size of the data group"
                )
            if self.made.num_frames != self.originals.frames:
                raise UserError(
                    f"the tokenizer was made for {_kind(self.made.num_frames)} but {self.originals.name} holds "
                    f"{_kind(self.originals.frames)}"
                )
        else:
            self._check_pairs(self.made)
        window = len(SSIM_CONVENTIONS[self.settings.ssim].weights)
        if "ssim" in self.active and min(self.size) < window:
            raise UserError(f"metric ssim needs pictures of at least {window}x{window}; remove it")

    def _inapplicable(self) -> dict[str, str]:
        metrics = self.settings.metrics
        reasons = {m: "needs job=samples" for m in metrics if m not in RECONSTRUCTION_METRICS}
        clips = self.originals.frames is not None
        others = set(DISTANCES) - set(CLIP_METRICS) if clips else set(CLIP_METRICS)
        what = "clips" if clips else "pictures"
        reasons |= {m: f"{what} are scored" for m in metrics if m in others}
        if "codebook" in metrics and not isinstance(self.made, Tokenizer):
            reasons["codebook"] = "needs checkpoint=<release folder of a tokenizer>"
        elif "codebook" in metrics and isinstance(self.made, Tokenizer) and not self.made.codebook_size:
            reasons["codebook"] = "the latents are continuous"
        if "sfid" in metrics and not getattr(self.extractor, "spatial_dim", None):
            reasons["sfid"] = "the extractor has no spatial features"
        return reasons

    def _check_pairs(self, made: Pictures) -> None:
        if len(made) != len(self.originals):
            raise UserError(
                f"{made.name} holds {len(made)} reconstructions but {self.originals.name} {len(self.originals)} "
                f"originals; they are compared one by one"
            )
        shapes = [tuple(pictures.read([0]).shape[1:]) for pictures in (made, self.originals)]
        if shapes[0] != shapes[1]:
            raise UserError(f"reconstructions have shape {list(shapes[0])} but originals {list(shapes[1])}")

    def run(self, processes: Processes) -> dict:
        """Compute the metrics; the result is complete on process 0.

        Returns:
            The parts of the report that this job knows.
        """
        total = len(self.originals)
        if total < processes.world_size:
            raise UserError(f"{total} pictures cannot be shared by {processes.world_size} processes; start fewer")
        if isinstance(self.made, Tokenizer):
            self.made = self.made.to(self.device).eval()
        codes = torch.zeros(self.made.codebook_size if isinstance(self.made, Tokenizer) else 0, dtype=torch.int64)
        state = torch.zeros(6, dtype=torch.float64)  # items, PSNR, exact copies, SSIM, LPIPS, unscaled reconstructions
        distances = bool(set(self.active) & set(DISTANCES))
        spatial = "sfid" in self.active
        fits = [Fits(self.extractor, total, spatial=spatial) for _ in range(2)] if self.extractor and distances else []
        index: list[Tensor] = []
        saved: dict[str, str] = {}
        failure: Exception | None = None
        try:
            for batch, made in self._pairs(processes, codes):
                state += self._pixel_sums(made, batch.pictures)
                index.append(batch.index)
                for fit, items in zip(fits, (made, batch.pictures), strict=False):
                    fit.update(extract(fit.extractor, items))
                if processes.rank == 0 and not saved:
                    saved["originals above, reconstructions below"] = str(self._save(batch.pictures, made))
        except Exception as error:  # told to the other processes before it goes on, or they would wait for ever
            failure = error
        processes.agree(failure)
        state, codes = processes.sum(state), processes.sum(codes)
        if int(state[0]) != total:
            raise UserError(f"{int(state[0])} pictures were scored but {total} were asked for")
        values = self._pixel_values(state)
        if "codebook" in self.active:
            values |= codebook_scores(codes)
        if fits:
            statistics = [fit.finish(torch.cat(index), processes) for fit in fits]
            if processes.rank == 0:
                values |= self._distances(*(Collected(total, self.size, statistics=s) for s in statistics))
        return self._result(total, values, saved)

    def _pairs(self, processes: Processes, codes: Tensor) -> Iterator[tuple[PictureBatch, Tensor]]:
        """Originals and their reconstructions, adding to the code counts."""
        batches = read_batches(
            self.originals,
            batch_size=batch_size(self.settings, self.originals),
            processes=processes,
            description="reconstructions",
        )
        for batch in batches:
            if isinstance(self.made, Tokenizer):
                clips = self.made.num_frames is not None
                with torch.inference_mode():
                    pixels = from_uint8(batch.pictures.to(self.device))
                    pixels = pixels.transpose(1, 2) if clips else pixels
                    if len(codes):
                        ids = self.made.encode(pixels)
                        rebuilt = self.made.decode(ids)
                        codes += torch.bincount(ids.flatten().cpu(), minlength=len(codes))
                    else:  # continuous latents have no ids to count
                        rebuilt = self.made.reconstruct(pixels)
                    made = quantise(rebuilt.float(), self.settings.quantise).cpu()
                made = made.transpose(1, 2) if clips else made
            else:
                made = self.made.read(batch.index.tolist())
            yield batch, made

    def _pixel_sums(self, made: Tensor, originals: Tensor) -> Tensor:
        """Sums over a batch, in the order of the state of :meth:`run`."""
        count = len(made)
        quality = psnr(made, originals)
        guard = RangeGuard()
        guard.update(made)
        pair = [items.flatten(0, -4) for items in (made, originals)]  # clips become frames
        frames = len(pair[0]) // count
        zero = torch.zeros((), dtype=torch.float64)
        likeness = ssim(*pair, convention=self.settings.ssim).sum() / frames if "ssim" in self.active else zero
        distance = zero
        if self.lpips is not None and "lpips" in self.active:
            with torch.inference_mode():
                distance = self.lpips(*(from_uint8(p.to(self.device)) for p in pair)).double().sum().cpu() / frames
        exact = (quality == PSNR_CAP).sum()
        sums = (torch.tensor(count), quality.sum(), exact, likeness, distance, torch.tensor(guard.binary))
        return torch.stack([value.double() for value in sums])

    def _save(self, originals: Tensor, made: Tensor) -> Path:
        if self.originals.frames is not None:
            originals, made = originals[0], made[0]
        shown = min(ITEMS_SHOWN, len(made))
        pictures = torch.cat([originals[:shown], made[:shown]])
        return save_grid(pictures, self.picture, columns=shown, scale=max(1, 64 // pictures.shape[-1]))

    def _pixel_values(self, state: Tensor) -> dict[str, float]:
        total, quality, copies, likeness, distance, binary = state.tolist()
        values: dict[str, float] = {}
        remark = None
        if not isinstance(self.made, Tokenizer):
            remark = RangeGuard.check(int(total), int(binary), self.made.name)
        if remark:
            self.warnings.append(remark)
        if "psnr" in self.active:
            values["psnr"] = quality / total
            if copies:
                self.warnings.append(f"{int(copies)} pictures came back exactly and count as {PSNR_CAP:g} dB")
        if "ssim" in self.active:
            values["ssim" if self.settings.ssim == "gaussian" else f"ssim_{self.settings.ssim}"] = likeness / total
        if "lpips" in self.active:
            values["lpips_vgg"] = distance / total
        return values

    def _distances(self, made: Collected, originals: Collected) -> dict[str, float]:
        assert self.extractor is not None
        assert originals.statistics is not None
        scores = FeatureScores(self.extractor, self.settings, self.active, self.warnings)
        scores.distances(made, originals.statistics, prefix="r")
        return scores.values

    def _result(self, total: int, values: dict[str, float], saved: dict[str, str]) -> dict:
        made = self.made
        return {
            "metrics": values,
            "n_samples": total,
            "n_reference": total,
            "label_histogram": None,
            "dataset": {
                "reference": self.originals.name,
                "resolution": list(self.size),
                "clip_frames": self.originals.frames,
            },
            "tokenizer": {"grid": list(made.grid), "codebook_size": made.codebook_size}
            if isinstance(made, Tokenizer)
            else None,
            "source": "memory" if isinstance(made, Tokenizer) else made.kind,
            "sampling": None,
            "pictures_saved": saved,
        }
