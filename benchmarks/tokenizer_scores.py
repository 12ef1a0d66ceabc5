"""Measurements of benchmarks.compare_tokenizers: reconstructions, samples and speed, one JSON row each."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks import flextok_lengths
from benchmarks.frechet_sweep import open_data, pictures, statistics
from benchmarks.measurements import add, rows
from benchmarks.sweep_queue import next_measurement
from vgen.checkpoints.release import load_pipeline, load_tokenizer
from vgen.data.extract import cache_codes
from vgen.evaluation.features import Extractor, load_extractor
from vgen.evaluation.frechet import FeatureStatistics, Gaussian, frechet_distance
from vgen.evaluation.pixel_metrics import psnr
from vgen.evaluation.statistics import SetStatistics, load_statistics, save_statistics
from vgen.pixels import from_uint8, save_grid, to_uint8
from vgen.runtime import pick_device
from vgen.sampling.pipeline import Pipeline, make_labels, sample_stream
from vgen.sampling.pixels import PixelSettings
from vgen.sampling.settings import Guidance, Sampling
from vgen.sampling.store import grid_order
from vgen.schedules.catalog import FOLDER
from vgen.tokenizers.flextok import FlexTok

# How a masked generator decodes: with the noise of TiTok's published generators, or with that of MaskGIT.
MASKED: dict[str, dict[str, Any]] = {
    "maskgit": {"steps": 12},
    "maskgit-plain": {
        "steps": 12,
        "noise_temperature": 1.0,
        "draw_temperature": 1.0,
        "softmax_annealing": False,
        "confidence": "log-probability",
    },
}
SHOWN = 12


@dataclass(frozen=True)
class Plan:
    """One way of generating.

    Attributes:
        label: in the tables.
        training: that made the generator.
        num_tokens: first tokens kept, for FlexTok; None = all.
        masked: key of MASKED, for a masked generator.
    """

    label: str
    training: str
    num_tokens: int | None = None
    masked: str | None = None

    def guidance(self, scale: float) -> Guidance:
        """Guidance of mean weight `scale`: constant, or for masked generators rising over the passes from none."""
        if self.masked is None:
            return Guidance(scale=scale)
        return Guidance(
            scale=2.0 * (scale - 1.0), schedule="linear", convention="one-plus", along="passes", initial=0.0
        )


class Bench:
    """What one process needs to measure.

    Args:
        out: folder of all results.
        arguments: of the command.
        reference: statistics of the training pictures; made by :meth:`make_reference`.
    """

    def __init__(self, out: Path, arguments: argparse.Namespace, reference: Path) -> None:
        self.out, self.arguments, self._reference = out, arguments, reference
        self.device = pick_device()
        torch.set_float32_matmul_precision("high")

    def extractor(self) -> Extractor:
        """Network behind distances and accuracies."""
        return load_extractor(self.arguments.features, name="proxy", weights=None, device=self.device)

    def reference(self) -> Gaussian:
        """Statistics of the training pictures."""
        return load_statistics(self._reference).pool

    @contextmanager
    def half(self) -> Iterator[None]:
        """Context of bfloat16 products on a GPU."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            yield

    def make_reference(self) -> None:
        """Statistics of the training pictures, and the distance of the held-out ones, the floor of every score."""
        source, extractor = open_data(self.arguments.data), self.extractor()
        train, test = (statistics(extractor, pictures(part)) for part in (source.train, source.val))
        if not rows(self.out, "floor"):
            add(self.out, "floor", {"fd_held_out": frechet_distance(test, train)})
        save_statistics(self._reference, SetStatistics(train))

    def cache(self, kind: str, release: Path) -> None:
        """Encode the data once for all generators of a tokenizer."""
        folder, tokenizer = self.out / "codes" / kind, load_tokenizer(release).to(self.device)
        source, size = open_data(self.arguments.data), self.arguments.batch_size
        cache_codes(source, tokenizer, folder, augmentation="flip", batch_size=size, device=self.device, seed=0)
        (folder / "done").touch()

    def _held_out(self) -> Tensor:
        return torch.cat(list(pictures(open_data(self.arguments.data).val)))

    def reconstruct(self, name: str, release: Path) -> None:
        """Distance, PSNR and code use of the held-out pictures, decoded from all their tokens."""
        network, originals = load_tokenizer(release).to(self.device), self._held_out()
        made, used = [], []
        for batch in originals.split(500):
            with torch.inference_mode():
                ids = network.encode(from_uint8(batch.to(self.device)))
                made.append(to_uint8(network.decode(ids)).cpu())
            used.append(ids.flatten().cpu())
        rebuilt = torch.cat(made)
        counts = torch.bincount(torch.cat(used), minlength=network.codebook_size).double()
        self._save_pictures(name, rebuilt, originals)
        row = {
            "tokenizer": name,
            "tokens": network.num_tokens,
            "codes": network.codebook_size,
            "fd": frechet_distance(statistics(self.extractor(), iter(rebuilt.split(500))), self.reference()),
            "psnr": psnr(rebuilt, originals).mean().item(),
            "codebook_usage": (counts > 0).double().mean().item(),
            "perplexity": torch.special.entr(counts / counts.sum()).sum().exp().item(),
            "parameters": sum(p.numel() for p in network.parameters()),
        }
        add(self.out, "reconstruction", row)

    def _save_pictures(self, name: str, rebuilt: Tensor, originals: Tensor) -> None:
        """Originals above their reconstructions."""
        shown = torch.cat([originals[:SHOWN], rebuilt[:SHOWN]])
        save_grid(shown, self.out / f"reconstruction_{name}.png", columns=SHOWN, scale=2)

    def lengths(self, release: Path) -> None:
        """Distance and PSNR of the held-out pictures from 1, 2, 4 ... tokens, and a picture, coarse to fine."""
        network, originals = load_tokenizer(release).to(self.device), self._held_out()
        assert isinstance(network, FlexTok)
        extractor, reference = self.extractor(), self.reference()
        known = {row["tokens"]: row for row in rows(self.out, "lengths")}
        columns = []
        ids = flextok_lengths.encode(network, list(originals.split(500)))
        counts = torch.bincount(ids.flatten().cpu(), minlength=network.codebook_size).double()
        scale = network.decoding.guidance.scale
        scale = 1.5 if callable(scale) else scale
        for length in flextok_lengths.doubled_lengths(network.num_tokens):
            # A length that was scored before is decoded for the picture only.
            some = ids[:SHOWN] if length in known else ids
            with self.half():
                made = flextok_lengths.rebuild(network, some, length, scale, self.arguments.batch_size)
            columns.append(made[:SHOWN])
            if length in known:
                continue
            row = {
                "tokenizer": "flextok",
                "tokens": length,
                "codes": network.codebook_size,
                "fd": frechet_distance(statistics(extractor, iter(made.split(500))), reference),
                "psnr": psnr(made, originals).mean().item(),
                "codebook_usage": (counts > 0).double().mean().item(),
                "perplexity": torch.special.entr(counts / counts.sum()).sum().exp().item(),
                "parameters": sum(p.numel() for p in network.parameters()),
                "guidance": scale,
            }
            add(self.out, "lengths", row)
        shown = torch.stack([*columns, originals[:SHOWN]], dim=1).flatten(0, 1)
        save_grid(shown, self.out / "coarse_to_fine.png", columns=len(columns) + 1, scale=2)

    # Generators

    def pipeline(self, plan: Plan, release: Path) -> Pipeline:
        """A generator with its tokenizer, ready to sample."""
        schedule = None
        if plan.masked is not None:
            schedule = yaml.safe_load((FOLDER / "masked.yaml").read_text()) | MASKED[plan.masked]
        cuda = self.device.type == "cuda"
        return load_pipeline(
            release,
            device=self.device,
            dtype=torch.bfloat16 if cuda else torch.float32,
            schedule=schedule,
            num_tokens=plan.num_tokens,
            engine=self.arguments.engine,
            pixels=PixelSettings(dtype="bfloat16" if cuda else "float32"),
        )

    def sample(self, plans: list[Plan], release: Path) -> None:
        """Distance and accuracy of some plans over guidance scales, then at each one's best scale with more samples.

        Scales go on where the best one is an edge of those tried; all plans get one scale before any gets the next.
        """
        by_label = {plan.label: plan for plan in plans}
        pipelines = {plan.label: self.pipeline(plan, release) for plan in plans}
        extractor, reference = self.extractor(), self.reference()
        while (todo := self._to_score(list(by_label))) is not None:
            label, scale, final = todo
            self._score(by_label[label], pipelines[label], extractor, reference, scale, final=final)
            # A recording belongs to one scale, and those of all plans would fill the device.
            pipelines[label].free_memory()

    def _to_score(self, labels: list[str]) -> tuple[str, float, bool] | None:
        """Plan, scale and whether it is the final score of what some plans lack first."""
        known = rows(self.out, "samples")
        tried = [row for row in known if row["plan"] in labels and not row["final"]]
        settings = self.arguments
        todo = next_measurement(labels, tried, scales=settings.scales, samples=settings.sweep)
        if todo is not None:
            return todo.plan, todo.scale, False
        finished = {row["plan"] for row in known if row["final"]}
        for label in labels:
            if label not in finished:
                best = min((row for row in tried if row["plan"] == label), key=lambda row: row["fd"])
                return label, best["scale"], True
        return None

    def _score(
        self, plan: Plan, pipeline: Pipeline, extractor: Extractor, reference: Gaussian, scale: float, *, final: bool
    ) -> dict[str, Any]:
        samples = self.arguments.samples if final else self.arguments.sweep
        labels = make_labels("balanced", samples, pipeline.num_classes, seed=0)
        sampling = Sampling(guidance=plan.guidance(scale))
        collected, hits, shown = FeatureStatistics(extractor.dim, extractor.device), 0, None
        for batch in sample_stream(pipeline, labels, sampling, batch_size=self.arguments.batch_size):
            features, logits = extractor(batch.images)
            collected.update(features)
            if logits is not None:
                hits += int((logits.argmax(-1).cpu() == batch.labels).sum())
            shown = shown or batch
        if final and shown is not None:
            index, columns = grid_order(shown.labels, pipeline.num_classes, 80)
            save_grid(shown.images[index], self.out / f"samples_{plan.label}.png", columns=columns, scale=2)
        row = {
            "plan": plan.label,
            "tokens": plan.num_tokens or pipeline.tokenizer.num_tokens,
            "scale": scale,
            "samples": samples,
            "final": final,
            "fd": frechet_distance(collected.gaussian(), reference),
            "accuracy": hits / samples,
        }
        add(self.out, "samples", row)
        return row

    def speed(self, plans: list[tuple[Plan, Path]]) -> None:
        """Images/s of every plan whose generator is there, guidance on: tokens alone, and with pixels; medians."""
        done = {row["plan"] for row in rows(self.out, "speed")}
        size = self.arguments.batch_size
        for plan, release in plans:
            if plan.label in done or not release.is_dir():
                continue
            pipeline = self.pipeline(plan, release)
            labels, index = make_labels("balanced", size, pipeline.num_classes, seed=0), torch.arange(size)
            sampling = Sampling(guidance=plan.guidance(2.0))
            # The first call warms up, the second records the graph.
            tokens = sorted(self._timed(lambda: pipeline.generate_ids(labels, index, sampling)) for _ in range(5))  # noqa: B023
            images = sorted(self._timed(lambda: pipeline.generate(labels, index, sampling)) for _ in range(3))  # noqa: B023
            row = {
                "plan": plan.label,
                "images_per_s": size / images[1],
                "tokens_only_per_s": size / tokens[1],
                "batch": size,
                "engine": self.arguments.engine,
                "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            }
            add(self.out, "speed", row)

    def _timed(self, work: Any) -> float:
        start = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start
