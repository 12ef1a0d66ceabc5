"""A fair comparison of decode orders on video: same tokens, same transformer, same number of training steps.

    python -m benchmarks.compare_video --out runs/video_orders
    python -m benchmarks.compare_video --out runs/video_orders --only table

Moving digits (embedded, no download), 17 frames of 64x64 pixels in 5x8x8 tokens. Stages, each of which is skipped where
its result is there, so that repeating the command goes on where it stopped; SIGTERM lets trainings save first:
``prepare`` (train the tokenizer, experiment=moving_digits_tokenizer_64, and beside it the proxy network of
benchmarks/video_proxy.py), ``codes`` (encode the clips once), ``reference`` (features of real clips; the tokenizer's
reconstructions), ``train`` (one run per order, several at once), ``score`` (Frechet distance over the proxy's features,
digit accuracy and steady motion over guidance scales and temperatures, then the best setting with more samples),
``speed`` (these networks, clips/s), ``decode`` (random weights at the size of NAR-L for video, against the device's
ceilings), ``pictures`` (MP4, GIF, contact sheet) and ``table`` (CSV, markdown and a plot).

The Frechet distances compare orders with each other; they are not FVD. ``steady`` is the share of clips whose digit
moves with piecewise constant velocity (benchmarks/motion.py).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cost import measure_ceilings, seconds_of
from benchmarks.decode import measure
from benchmarks.measurements import add, check_same, rows
from benchmarks.motion import moves_steadily
from benchmarks.networks import SIZES, make_generator, make_plan
from benchmarks.side_by_side import Command, run_side_by_side, stoppable, training_command
from benchmarks.video_proxy import NAME, all_clips, judged, load_proxy, open_clips, other_clips
from benchmarks.video_table import write_table
from vgen.checkpoints.release import load_pipeline, load_tokenizer
from vgen.data.extract import cache_codes
from vgen.data.moving_digits import FPS, MovingDigits
from vgen.errors import UserError, reported
from vgen.evaluation.frechet import Gaussian, frechet_distance, gaussian_of
from vgen.evaluation.pixel_metrics import psnr
from vgen.evaluation.statistics import SetStatistics, load_statistics, save_statistics
from vgen.media import contact_sheet, save_gif, save_mp4, tiled
from vgen.pixels import frames_of, from_uint8, to_uint8
from vgen.runtime import pick_device, versions
from vgen.sampling.pipeline import Pipeline, make_labels, sample_stream
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.building import parse_grid

STAGES = ("prepare", "codes", "reference", "train", "score", "speed", "decode", "pictures", "table")
ORDERS = {
    "raster": ["schedule=raster"],
    "neighboring": ["schedule=neighboring"],
    "parallel-4": ["schedule=parallel", "schedule.regions=4"],
}
REAL_KEYS, AGAIN_KEYS, HELD_OUT_KEYS = 2 * 10**7, 3 * 10**7, 4 * 10**7
"""First keys of the reference clips, of a second set like it, and of clips of scans that no training showed."""
NAR_CODES, UCF_CLASSES = 8192, 101


class Comparison:
    """The stages over one output folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out = Path(arguments.out).absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        self.source, self.options = open_clips(arguments.data)
        self.device = pick_device(arguments.device)
        names = ("data", "steps", "samples", "final", "scales", "temperatures", "set_tokenizer", "set_generator")
        check_same(self.out, {name: getattr(arguments, name) for name in names})

    # Training

    @property
    def tokenizer_release(self) -> Path:
        """Release of the tokenizer, given or trained here."""
        given = self.arguments.tokenizer
        return Path(given).absolute() if given else self.out / "tokenizer" / "release"

    def prepare(self) -> None:
        """Train tokenizer and proxy beside each other."""
        commands, data = [], self.arguments.data
        if not self.tokenizer_release.is_dir():
            words = [
                "experiment=moving_digits_tokenizer_64",
                *(f"data.{word}" for word in data),
                f"trainer.max_time={_clock(self.arguments.tokenizer_seconds)}",
                "every.validate=0",
                *self.arguments.set_tokenizer,
            ]
            commands.append(training_command("tokenizer", words, self.out / "tokenizer"))
        if not (proxy := self.out / "proxy.pt").is_file():
            words = [sys.executable, "-m", "benchmarks.video_proxy", "--out", str(proxy), "--data", *data]
            words += ["--steps", str(self.arguments.proxy_steps), "--clips", str(self.arguments.proxy_clips)]
            words += ["--device", self.arguments.device]
            commands.append(Command("proxy", words, self.out / "proxy.log", folder=Path.cwd()))
        run_side_by_side(commands, per_device=2)

    def codes(self) -> None:
        """Encode the clips once for all orders."""
        if (self.out / "codes" / "done").is_file():
            return
        tokenizer = load_tokenizer(self.tokenizer_release).to(self.device)
        cache_codes(
            self.source,
            tokenizer,
            self.out / "codes",
            augmentation="none",
            batch_size=100,
            device=self.device,
            seed=0,
            num_workers=self.arguments.workers,
        )
        (self.out / "codes" / "done").touch()

    def train(self) -> None:
        """Train every order that has no release yet, ``--jobs`` at once per device."""
        commands = []
        for name in self.arguments.orders:
            if (self.out / name / "release").is_dir():
                continue
            words = [
                "experiment=video_orders",
                *ORDERS[name],
                f"data.path={self.out / 'codes'}",
                f"task.tokenizer={self.tokenizer_release}",
                f"trainer.max_steps={self.arguments.steps}",
                *self.arguments.set_generator,
            ]
            commands.append(training_command(name, words, self.out / name))
        run_side_by_side(commands, per_device=self.arguments.jobs)

    # Scores

    def measure(self, clips: Tensor, labels: Tensor, reference: Gaussian | None) -> tuple[dict[str, float], Gaussian]:
        """Figures of clips uint8 [B, 3, T, H, W] with the digits they should show, and the fit of their features."""
        network, _ = load_proxy(self.out / "proxy.pt", self.device)
        features, logits, _ = judged(network, clips, self.device)
        fit = gaussian_of(features)
        speed = (self.options["min_speed"], self.options["max_speed"])
        steady = torch.cat([moves_steadily(part.to(self.device), speed=speed) for part in clips.split(200)])
        figures = {
            "clips": len(clips),
            "digit_accuracy": float((logits.argmax(1) == labels).double().mean()),
            "steady": float(steady.double().mean()),
        }
        if reference is not None:
            figures["fd_proxy"] = frechet_distance(fit, reference)
        return figures, fit

    def reference(self) -> None:
        """Figures of real clips and of the tokenizer's reconstructions; the statistics that samples are scored by."""
        path = self.out / "reference.npz"
        done = {row["what"] for row in rows(self.out, "reference")}
        train, held_out = self.source.train, self.source.val
        assert isinstance(train, MovingDigits)
        assert isinstance(held_out, MovingDigits)
        count = self.arguments.final
        real = other_clips(train, count, first_key=REAL_KEYS)
        if not path.is_file():
            _, fit = self.measure(all_clips(real), real.labels, None)
            save_statistics(path, SetStatistics(fit))
        fit = self._reference()
        for what, clips in (
            ("real clips (the reference)", real),
            ("other real clips", other_clips(train, count, first_key=AGAIN_KEYS)),
            ("real clips, unseen scans", other_clips(held_out, count, first_key=HELD_OUT_KEYS)),
        ):
            if what not in done:
                figures, _ = self.measure(all_clips(clips), clips.labels, fit)
                add(self.out, "reference", {"what": what, "extractor": NAME, **figures})
        if "reconstructions" not in done:
            self._score_reconstructions(other_clips(held_out, count, first_key=HELD_OUT_KEYS), fit)

    def _reference(self) -> Gaussian:
        return load_statistics(self.out / "reference.npz").pool

    def _score_reconstructions(self, dataset: MovingDigits, reference: Gaussian) -> None:
        tokenizer = load_tokenizer(self.tokenizer_release).to(self.device)
        originals, rebuilt, used, quality = all_clips(dataset), [], [], []
        with torch.inference_mode():
            for batch in originals.split(100):
                ids = tokenizer.encode(from_uint8(batch.to(self.device)))
                clips = to_uint8(tokenizer.decode(ids))
                quality.append(psnr(frames_of(clips), frames_of(batch.to(self.device))).cpu())
                rebuilt.append(clips.cpu())
                used.append(ids.flatten().cpu())
        clips = torch.cat(rebuilt)
        figures, fit = self.measure(clips, dataset.labels, reference)
        counts = torch.bincount(torch.cat(used), minlength=tokenizer.codebook_size).double()
        own = self.measure(originals, dataset.labels, None)[1]
        add(
            self.out,
            "reference",
            {
                "what": "reconstructions",
                "extractor": NAME,
                **figures,
                "rfd_proxy": frechet_distance(fit, own),
                "psnr": float(torch.cat(quality).mean()),
                "codes_used": float((counts > 0).double().mean()),
                "perplexity": float(torch.special.entr(counts / counts.sum()).sum().exp()),
                "tokens": list(tokenizer.grid),
            },
        )

    def pipeline(self, order: str) -> Pipeline:
        """A trained order, ready to decode."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        release = self.out / order / "release"
        if not release.is_dir():
            raise UserError(f"{order} is not trained; run the stage train first")
        return load_pipeline(release, device=self.device, dtype=dtype)

    def score(self) -> None:
        """Every order at every setting, then its best setting with more samples; a process per order with --jobs."""
        done = {row["order"] for row in rows(self.out, "score") if row["final"]}
        missing = [order for order in self.arguments.orders if order not in done]
        if len(missing) > 1 and self.arguments.jobs > 1:
            words = [sys.executable, "-m", "benchmarks.compare_video", *self.arguments.words, "--only", "score"]
            run_side_by_side(
                [
                    Command(
                        f"score {order}", [*words, "--orders", order], self.out / order / "score.log", folder=Path.cwd()
                    )
                    for order in missing
                ],
                per_device=self.arguments.jobs,
            )
            return
        for order in missing:
            self._score_order(order)

    def _score_order(self, order: str) -> None:
        pipeline, reference = self.pipeline(order), self._reference()
        known = {(r["scale"], r["temperature"]): r for r in rows(self.out, "score") if r["order"] == order}
        scored = []
        for temperature in self.arguments.temperatures:
            for scale in self.arguments.scales:
                row = known.get((scale, temperature))
                scored.append(row or self._score(order, pipeline, reference, scale, temperature, final=False))
        best = min(scored, key=lambda row: row["fd_proxy"])
        self._score(order, pipeline, reference, best["scale"], best["temperature"], final=True)

    def _score(
        self, order: str, pipeline: Pipeline, reference: Gaussian, scale: float, temperature: float, *, final: bool
    ) -> dict[str, Any]:
        count = self.arguments.final if final else self.arguments.samples
        labels = make_labels("balanced", count, pipeline.num_classes, seed=0)
        sampling = Sampling(temperature=temperature, guidance=Guidance(scale=scale))
        batches = list(sample_stream(pipeline, labels, sampling, batch_size=self.arguments.batch_size))
        clips = torch.cat([batch.images for batch in batches])
        figures, _ = self.measure(clips, torch.cat([batch.labels for batch in batches]), reference)
        setting = {"order": order, "scale": scale, "temperature": temperature, "final": final}
        row = {**setting, "extractor": NAME, **figures}
        add(self.out, "score", row)
        return row

    def best(self, order: str) -> Sampling | None:
        """The sampling settings an order was scored best with; None if it has not been scored."""
        finals = [row for row in rows(self.out, "score") if row["order"] == order and row["final"]]
        if not finals:
            return None
        return Sampling(temperature=finals[0]["temperature"], guidance=Guidance(scale=finals[0]["scale"]))

    # Speed

    def speed(self) -> None:
        """Clips/s of every trained order alone on the device, guidance on, median of three after two warm-ups."""
        done = {row["order"] for row in rows(self.out, "speed")}
        for order in self.arguments.orders:
            if order in done:
                continue
            pipeline, size = self.pipeline(order), self.arguments.batch_size
            labels, index = make_labels("balanced", size, pipeline.num_classes, seed=0), torch.arange(size)
            sampling = Sampling(guidance=Guidance(scale=2.0))
            rates = {}
            for name, work in (("tokens", pipeline.generate_ids), ("pixels", pipeline.generate)):
                seconds = [seconds_of(partial(work, labels, index, sampling), self.device) for _ in range(5)]
                rates[f"clips_per_s_{name}"] = size / sorted(seconds[2:])[1]
            passes = len(pipeline.plan.forwards)
            add(
                self.out,
                "speed",
                {"order": order, "passes": passes, "batch": size, **rates, "device": self.device_name},
            )

    @property
    def device_name(self) -> str:
        """The card, or cpu."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def decode(self) -> None:
        """Random weights at the size of NAR-L for video: cheap orders first, each row kept when it is known."""
        done = {(row["grid"], row["order"], row["batch"]) for row in rows(self.out, "decode")}
        pairs = [(grid, order) for grid in self.arguments.decode_grids for order in self.arguments.orders]
        pairs.sort(key=lambda pair: len(make_plan(pair[1], parse_grid(pair[0])).forwards))
        given = self.arguments
        wanted = [
            (grid, order, batch)
            for grid, order in pairs
            for batch in (given.decode_raster_batch if order == "raster" else given.decode_batch)
        ]
        missing = [key for key in wanted if key not in done]
        if not missing:
            return
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        ceilings = measure_ceilings(self.device, dtype)
        for grid, order in dict.fromkeys((grid, order) for grid, order, _ in missing):
            plan = make_plan(order, parse_grid(grid))
            sizes = {"vocab_size": NAR_CODES, "num_classes": UCF_CLASSES}
            generator = make_generator(self.arguments.decode_size, plan, device=self.device, dtype=dtype, **sizes)
            for batch in (batch for other, name, batch in missing if (other, name) == (grid, order)):
                try:
                    row = measure(
                        generator,
                        plan,
                        order=order,
                        batch=batch,
                        engine="graph" if self.device.type == "cuda" else "eager",
                        ceilings=ceilings,
                        sampling=Sampling(guidance=Guidance(scale=2.0)),
                        repeats=self.arguments.decode_repeats,
                    )
                except torch.OutOfMemoryError:
                    print(f"{order} at {grid}: a batch of {batch} does not fit in memory", flush=True)
                    break
                add(self.out, "decode", {"grid": grid, **vars(row), **vars(ceilings), "device": self.device_name})

    # Results

    def pictures(self) -> None:
        """Two clips per digit of every scored order, of the tokenizer and of real clips, for people to watch."""
        folder = self.out / "pictures"
        held_out = self.source.val
        assert isinstance(held_out, MovingDigits)
        real = all_clips(other_clips(held_out, 20, first_key=HELD_OUT_KEYS))
        if self._undrawn("real"):
            self._draw("real", real)
        if self.tokenizer_release.is_dir() and self._undrawn("reconstructions"):
            tokenizer = load_tokenizer(self.tokenizer_release).to(self.device)
            with torch.inference_mode():
                self._draw("reconstructions", to_uint8(tokenizer.reconstruct(from_uint8(real.to(self.device)))))
        for order in self.arguments.orders:
            sampling = self.best(order)
            if sampling is not None and self._undrawn(order):
                self._draw(order, self.pipeline(order).generate(torch.arange(20) % 10, torch.arange(20), sampling))
        print(f"pictures: {folder}", flush=True)

    def _undrawn(self, name: str) -> bool:
        return not (self.out / "pictures" / f"{name}.gif").is_file()

    def _draw(self, name: str, clips: Tensor) -> None:
        """An MP4 of all clips; GIF and contact sheet of the first ten in 16 grey levels, small enough for a README."""
        folder, clips = self.out / "pictures", clips.cpu()
        few = (clips[:10].float() / 17).round().mul(17).to(torch.uint8)
        contact_sheet(few, folder / f"{name}.png", frames=9)
        try:
            save_mp4(_doubled(tiled(clips, columns=10)), folder / f"{name}.mp4", fps=FPS)
        except UserError as error:
            print(f"no {name}.mp4: {error}", flush=True)
        # Last, because it says that the others are there.
        save_gif(tiled(few, columns=5), folder / f"{name}.gif", fps=FPS)

    def table(self) -> None:
        """video.csv, video.md and video.png from the rows so far."""
        found = {stage: rows(self.out, stage) for stage in ("reference", "score", "speed", "decode")}
        proxy = load_proxy(self.out / "proxy.pt", torch.device("cpu"))[1] if (self.out / "proxy.pt").is_file() else {}
        write_table(self.out, found, proxy)


def _doubled(clip: Tensor) -> Tensor:
    """A clip uint8 [3, T, H, W] at twice its size."""
    return clip.repeat_interleave(2, 2).repeat_interleave(2, 3)


def _clock(seconds: int) -> str:
    """Seconds as Lightning's DD:HH:MM:SS."""
    return f"{seconds // 86400:02d}:{seconds // 3600 % 24:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="where runs and results go; repeating the command goes on there")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda; trainings use the visible devices")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once per device")
    parser.add_argument("--workers", type=int, default=6, help="processes that draw clips while they are encoded")
    parser.add_argument("--data", nargs="*", default=[], metavar="key=value", help="changes of configs/data")
    parser.add_argument("--tokenizer", help="tokenizer release; without it one is trained")
    parser.add_argument("--tokenizer-seconds", type=int, default=150, help="training time of the tokenizer")
    parser.add_argument("--proxy-steps", type=int, default=1500)
    parser.add_argument("--proxy-clips", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=3000, help="training steps per order")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.8])
    parser.add_argument("--samples", type=int, default=500, help="clips per setting")
    parser.add_argument("--final", type=int, default=2000, help="clips at the best setting, and real ones")
    parser.add_argument("--batch-size", type=int, default=250, help="clips per batch of sampling")
    parser.add_argument("--decode-size", choices=SIZES, default="L")
    parser.add_argument("--decode-grids", nargs="+", default=["5x16x16", "4x16x16"])
    parser.add_argument("--decode-batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--decode-raster-batch", type=int, nargs="+", default=[1, 64], help="recording takes long")
    parser.add_argument("--decode-repeats", type=int, default=3)
    parser.add_argument("--set-tokenizer", nargs="*", default=[], metavar="key=value", help="overrides of its training")
    parser.add_argument("--set-generator", nargs="*", default=[], metavar="key=value", help="overrides of every order")
    given = parser.parse_args(arguments)
    given.words = list(sys.argv[1:] if arguments is None else arguments)
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that were asked for."""
    given = parse(arguments)
    with reported(), stoppable():
        comparison = Comparison(given)
        for stage in STAGES:
            if stage in given.only:
                start = time.perf_counter()
                getattr(comparison, stage)()
                print(f"-- {stage}: {time.perf_counter() - start:.0f} s", flush=True)
        libraries = versions() | {"cudnn": str(torch.backends.cudnn.version()), "device": comparison.device_name}
        (comparison.out / "versions.json").write_text(json.dumps(libraries))


if __name__ == "__main__":
    main()
