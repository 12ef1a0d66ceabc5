"""A fair comparison of decode orders: same tokens, same transformer, same number of training steps.

    python -m benchmarks.compare_orders --data DATA --features features.pt --out runs/orders
    python -m benchmarks.compare_orders --data DATA --features features.pt --out runs/orders --only table

DATA is a folder in Hugging Face layout (CIFAR-10 for the published table). Stages, each of which is skipped where its
result is there, so that repeating the command goes on where it stopped: ``tokenizer`` (train
experiment=cifar10_tokenizer, unless --tokenizer names a release), ``codes`` (encode the data once, and collect the
statistics that scores are taken against), ``train`` (one run per order, several at once), ``sweep`` (Frechet distance
and class accuracy over guidance scales, scale after scale for all plans, continued while the best scale is an edge of
those tried), ``speed`` (one plan after the other; nothing else should use the device), ``final`` (the best scales again
with more samples; of several numbers all plans get the first before any gets the next), ``table`` (CSV, markdown and a
plot of what is known, also after an interruption).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from benchmarks import order_tables as tables
from benchmarks.cost import seconds_of
from benchmarks.frechet_sweep import open_data, pictures, statistics
from benchmarks.measurements import add, check_same, rows
from benchmarks.side_by_side import Command, run_side_by_side, stoppable, training_command
from benchmarks.sweep_queue import Measurement, claim, next_measurement
from vgen.checkpoints.release import load_pipeline, load_tokenizer
from vgen.data.extract import cache_codes
from vgen.errors import reported
from vgen.evaluation.features import Extractor, load_extractor
from vgen.evaluation.frechet import FeatureStatistics, Gaussian, frechet_distance
from vgen.evaluation.statistics import SetStatistics, load_statistics, save_statistics
from vgen.runtime import pick_device, versions
from vgen.sampling.decode import decode
from vgen.sampling.engine import Engine
from vgen.sampling.pipeline import Pipeline, make_labels, sample_stream
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.catalog import FOLDER

STAGES = ("tokenizer", "codes", "train", "sweep", "speed", "final", "table")


@dataclass(frozen=True)
class Order:
    """One training and the plans its network decodes by.

    Attributes:
        schedule: name of the schedule trained with.
        options: its options.
        overrides: further words of the training command.
        plans: label -> (schedule, options) to decode with.
    """

    schedule: str
    options: dict[str, Any] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    plans: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)


ORDERS = {
    "raster": Order(
        "raster",
        plans={
            "raster": ("raster", {}),
            "zipar-4": ("zipar", {"window": 4}),
            "zipar-2": ("zipar", {"window": 2}),
            "zipar-2-adaptive": ("zipar", {"window": 2, "adaptive": True}),
        },
    ),
    "diagonal": Order("diagonal", plans={"diagonal": ("diagonal", {})}),
    "neighboring": Order("neighboring", plans={"neighboring": ("neighboring", {})}),
    "parallel-4": Order("parallel", {"regions": 4}, plans={"parallel-4": ("parallel", {"regions": 4})}),
    "random": Order(
        "randar",
        plans={
            "random": ("randar", {}),
            "random-24": ("randar", {"steps": 24}),
            "random-15": ("randar", {"steps": 15}),
        },
    ),
    "rar": Order(
        "rar",
        # Random orders for half of the training, annealed to raster at three quarters, as published.
        {"anneal_start": "half", "anneal_end": "three_quarters"},
        ("generator.positions=own_target",),
        {"rar": ("rar", {})},
    ),
}


class Comparison:
    """The stages over one output folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out = Path(arguments.out).absolute()
        self.orders = {name: ORDERS[name] for name in arguments.orders}
        self._pipelines: dict[str, Pipeline] = {}
        self.out.mkdir(parents=True, exist_ok=True)
        names = ("data", "features", "tokenizer", "steps", "samples", "final", "scales", "set")
        check_same(self.out, {name: getattr(arguments, name) for name in names})

    # Training

    @property
    def tokenizer_release(self) -> Path:
        """Release of the tokenizer, given or trained here."""
        given = self.arguments.tokenizer
        return Path(given).absolute() if given else self.out / "tokenizer" / "release"

    def tokenizer(self) -> None:
        """Train the tokenizer with its own recipe."""
        if not self.tokenizer_release.is_dir():
            words = ["experiment=cifar10_tokenizer", f"data.path={Path(self.arguments.data).absolute()}"]
            run_side_by_side([self._training("tokenizer", words)], per_device=1)

    def codes(self) -> None:
        """Encode the data once for all orders, and collect the feature statistics scores are taken against."""
        folder, reference, device = self.out / "codes", self.out / "reference.npz", pick_device()
        if (folder / "done").is_file() and reference.is_file():
            return
        source, tokenizer = open_data(self.arguments.data), load_tokenizer(self.tokenizer_release).to(device)
        cache_codes(source, tokenizer, folder, augmentation="flip", batch_size=1000, device=device, seed=0)
        (folder / "done").touch()
        extractor = load_extractor(self.arguments.features, name="proxy", weights=None, device=device)
        train, test = (statistics(extractor, pictures(part)) for part in (source.train, source.val))
        if not rows(self.out, "floor"):
            add(self.out, "floor", {"fd_held_out": frechet_distance(test, train)})
        save_statistics(reference, SetStatistics(train))

    def options_of(self, order: Order) -> dict[str, Any]:
        """Options of a training's schedule; parts of the training become steps."""
        parts = {"half": self.arguments.steps // 2, "three_quarters": self.arguments.steps * 3 // 4}
        return {key: parts.get(value, value) for key, value in order.options.items()}

    def train(self) -> None:
        """Train every order that has no release yet, ``--jobs`` at once per device."""
        commands = []
        for name, order in self.orders.items():
            if (self.out / name / "release").is_dir():
                continue
            words = [
                "experiment=cifar10_orders",
                f"schedule={order.schedule}",
                *(f"schedule.{key}={value}" for key, value in self.options_of(order).items()),
                f"data.path={self.out / 'codes'}",
                f"task.tokenizer={self.tokenizer_release}",
                f"trainer.max_steps={self.arguments.steps}",
                *order.overrides,
            ]
            commands.append(self._training(name, words))
        run_side_by_side(commands, per_device=self.arguments.jobs)

    def _training(self, name: str, words: Sequence[str]) -> Command:
        return training_command(name, [*words, *self.arguments.set], self.out / name)

    # Scores

    def plans(self) -> list[tuple[str, str, dict[str, Any]]]:
        """(label, training, schedule configuration) of every decode."""
        found = []
        for name, order in self.orders.items():
            for label, (schedule, options) in order.plans.items():
                config = yaml.safe_load((FOLDER / f"{schedule}.yaml").read_text())
                found.append((label, name, config | self.options_of(Order(schedule, options))))
        return found

    def pipeline(self, label: str) -> Pipeline:
        """A trained order, ready to decode by a plan; kept, so that a process loads and compiles each once."""
        if label not in self._pipelines:
            device = pick_device()
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            training, schedule = next(plan[1:] for plan in self.plans() if plan[0] == label)
            release = self.out / training / "release"
            self._pipelines[label] = load_pipeline(
                release, device=device, dtype=dtype, schedule=schedule, engine=self.arguments.engine
            )
        return self._pipelines[label]

    def next_measurement(self, labels: Sequence[str], finals: Sequence[int] = ()) -> Measurement | None:
        """What some plans lack first, given the rows so far."""
        settings = self.arguments
        return next_measurement(
            labels, rows(self.out, "sweep"), scales=settings.scales, samples=settings.samples, finals=finals
        )

    def sweep(self) -> None:
        """Every plan at every guidance scale."""
        self._measure("sweep", ())

    def final(self) -> None:
        """Every plan at its best scale, with more samples."""
        self._measure("final", self.arguments.final)

    def _measure(self, stage: str, finals: Sequence[int]) -> None:
        """Do what the plans lack, in this process or in several that share the plans."""
        unfinished = [label for label, _, _ in self.plans() if self.next_measurement([label], finals) is not None]
        processes = min(len(unfinished), max(1, torch.cuda.device_count()) * self.arguments.scorers)
        if processes < 2:
            self._measure_here(finals)
            return
        words = [sys.executable, "-m", "benchmarks.compare_orders", *self.arguments.words]
        words += ["--only", stage, "--scorers", "1"]
        run_side_by_side(
            [
                Command(f"{stage} {i}", words, self.out / f"{stage}-{i}.log", folder=Path.cwd())
                for i in range(processes)
            ],
            per_device=self.arguments.scorers,
        )

    def _measure_here(self, finals: Sequence[int]) -> None:
        """Score what no other process scores.

        A plan belongs to the process that comes to it first. Since every process makes a measurement before it looks
        for the next plan, those with fast plans get more of them.
        """
        plans = [label for label, _, _ in self.plans()]
        reference = load_statistics(self.out / "reference.npz").pool
        extractor = load_extractor(self.arguments.features, name="proxy", weights=None, device=pick_device())
        mine: set[str] = set()
        others: set[str] = set()
        with ExitStack() as claims:
            while todo := self.next_measurement([label for label in plans if label not in others], finals):
                if todo.plan not in mine:
                    # Looked at again before it is scored: another process may have added rows and gone.
                    taken = claim(self.out / "claims" / todo.plan, claims)
                    (mine if taken else others).add(todo.plan)
                    continue
                self._score(todo, self.pipeline(todo.plan), extractor, reference)
                # A recording belongs to one scale, and those of all plans would fill the device.
                self.pipeline(todo.plan).free_memory()

    def _score(self, todo: Measurement, pipeline: Pipeline, extractor: Extractor, reference: Gaussian) -> None:
        labels = make_labels("balanced", todo.samples, pipeline.num_classes, seed=0)
        sampling = Sampling(guidance=Guidance(scale=todo.scale))
        collected, hits = FeatureStatistics(extractor.dim, extractor.device), 0
        for batch in sample_stream(pipeline, labels, sampling, batch_size=self.arguments.batch_size):
            features, logits = extractor(batch.images)
            collected.update(features)
            if logits is not None:
                hits += int((logits.argmax(-1).cpu() == batch.labels).sum())
        fd = frechet_distance(collected.gaussian(), reference)
        add(self.out, "sweep", vars(todo) | {"fd": fd, "accuracy": hits / todo.samples})

    def speed(self) -> None:
        """Images/s of every plan alone on the device, tokens only, guidance on, median of three after a warm-up."""
        device = pick_device()
        done = {row["plan"] for row in rows(self.out, "speed")}
        for label, _, _ in self.plans():
            if label in done:
                continue
            pipeline = self.pipeline(label)
            size = self.arguments.batch_size
            labels, index = make_labels("balanced", size, pipeline.num_classes, seed=0), torch.arange(size)
            sampling = Sampling(guidance=Guidance(scale=2.0))
            seconds = [seconds_of(partial(pipeline.generate_ids, labels, index, sampling), device) for _ in range(4)]
            passes: list[int] = []
            decode(
                pipeline.generator,
                pipeline.plan,
                labels[:100].to(device),
                sampling=sampling,
                sample_index=index[:100],
                watch=lambda number, _, seen=passes: seen.append(number),
            )
            add(
                self.out,
                "speed",
                {
                    "plan": label,
                    "images_per_s": size / sorted(seconds[1:])[1],
                    "batch": size,
                    "passes": len(passes),
                    "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                },
            )
            pipeline.free_memory()

    # Results

    def table(self) -> None:
        """orders.csv, orders.md and orders.png from the rows so far."""
        settings = self.arguments
        tables.write(
            self.out,
            [(label, training) for label, training, _ in self.plans()],
            rows(self.out, "sweep"),
            rows(self.out, "speed"),
            samples=settings.samples,
            finals=settings.final,
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder in Hugging Face layout")
    parser.add_argument("--features", required=True, help="TorchScript extractor of (features, class logits)")
    parser.add_argument("--out", required=True, help="where runs and results go; repeating the command goes on there")
    parser.add_argument("--tokenizer", help="tokenizer release; without it one is trained")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--steps", type=int, default=6000, help="training steps per order")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once per device")
    parser.add_argument("--scorers", type=int, default=1, help="processes at once per device that score plans")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 2.5, 3.0, 4.0])
    parser.add_argument("--samples", type=int, default=10000, help="per guidance scale")
    parser.add_argument("--final", type=int, nargs="+", default=[50000], help="at the best scale; several, rising")
    parser.add_argument("--batch-size", type=int, default=1000)
    parser.add_argument("--engine", choices=get_args(Engine), default="auto", help="how plans are decoded")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides of every training")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    given = parser.parse_args(arguments)
    given.words = list(sys.argv[1:] if arguments is None else arguments)
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that were asked for."""
    given = parse(arguments)
    with reported(), stoppable():
        comparison = Comparison(given)
        (comparison.out / "versions.json").write_text(json.dumps(versions()))
        try:
            for stage in STAGES[:-1]:
                if stage in given.only:
                    start = time.perf_counter()
                    getattr(comparison, stage)()
                    print(f"-- {stage}: {time.perf_counter() - start:.0f} s", flush=True)
        finally:
            if "table" in given.only:
                comparison.table()


if __name__ == "__main__":
    main()
