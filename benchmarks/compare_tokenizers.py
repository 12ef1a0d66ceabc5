"""1D tokenizers on CIFAR-10: TiTok in two stages and in one, FlexTok at every length, and generators on their tokens.

    python -m benchmarks.compare_tokenizers --data DATA --features features.pt --out OUT --tokenizer VQ
    python -m benchmarks.compare_tokenizers --data DATA --features features.pt --out OUT --trainings flextok_ar
    python -m benchmarks.compare_tokenizers --data DATA --features features.pt --out OUT --only table

DATA is a folder in Hugging Face layout; VQ is the release of experiment=cifar10_tokenizer, teacher of the two-stage
TiTok. ``--trainings`` leaves out all that neither these need nor measures them. Every training stops by its time budget
(``--seconds``). Trainings and measurements run in processes of their own, ``--jobs`` at once per device of
CUDA_VISIBLE_DEVICES, each as soon as what it needs is there. On SIGTERM, Ctrl-C or after ``--limit`` seconds all of
them are told to stop and save; the same command goes on where it stopped and leaves out what is finished. Rows are
appended to OUT/*.jsonl as soon as they are known; ``--only table`` makes the tables and plots of the rows so far
(:mod:`benchmarks.tokenizer_tables`).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import tokenizer_scores as scores
from benchmarks import tokenizer_tables as tables
from benchmarks.measurements import add, check_same, rows
from benchmarks.side_by_side import Command, run_side_by_side, training_command
from vgen.checkpoints.release import CONFIG
from vgen.errors import UserError, reported
from vgen.runtime import versions

SECONDS = {
    "vae": 90,
    "titok_stage1": 130,
    "titok_stage2": 90,
    "titok_single": 170,
    "flextok": 420,
    "flextok_ar": 100,
    "titok_ar": 90,
    "titok_maskgit": 90,
}
# What trainings of one or two minutes set otherwise than their ten-minute recipes: compilation and validation would
# take a third of the time, and warm-up, average and discriminator have to fit into some 1,000 to 5,000 steps. FlexTok
# has longer, and its val/gain tells early whether the decoder listens to the tokens.
SHORT = ("task.compile=false", "every.validate=0", "every.pictures=0", "every.log=50", "task.lr_schedule.warmup=150")
# A VAE of a quarter of the work at full resolution: FlexTok's training runs it in float32 on every batch.
VAE_CHANNELS = "block_channels=[64,128,256]"
# Less than half of the parameters of configs/tokenizer/titok_32.yaml: in two or three minutes the steps count for more.
TITOK_SIZE = tuple(
    f"tokenizer.{part}.{key}={value}"
    for part in ("encoder", "decoder")
    for key, value in (("width", 384), ("layers", 6), ("heads", 6))
)
PLAN_TOKENS = (4, 16, 64)


class Comparison:
    """The tasks over one output folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out = Path(arguments.out).absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        self.reference = Path(arguments.reference).absolute() if arguments.reference else self.out / "reference.npz"
        self.seconds = SECONDS | arguments.seconds

    def check_same(self) -> None:
        """Refuse to go on with other settings in the same folder: the rows would not be comparable.

        Raises:
            UserError: naming the settings that differ.
        """
        names = ("data", "features", "tokenizer", "raster", "reference", "titok", "samples", "sweep", "scales", "set")
        settings = {name: getattr(self.arguments, name) for name in names}
        check_same(self.out, settings, later=("raster", "tokenizer"))

    # What there is to do

    def release(self, name: str) -> Path:
        """Release of a training, or one that was given."""
        given = {"vq": self.arguments.tokenizer or "", "raster": self.arguments.raster}
        return Path(given[name]).absolute() if name in given else self.out / name / "release"

    def titok(self) -> str:
        """The TiTok that generators are trained on: that with the lower distance, unless one was asked for."""
        if self.arguments.titok != "better":
            return f"titok_{self.arguments.titok}"
        found = {row["tokenizer"]: row["fd"] for row in rows(self.out, "reconstruction")}
        return min(("titok_stage2", "titok_single"), key=lambda name: found.get(name, float("inf")))

    def tasks(self) -> list[Command]:
        """What was asked for, in the order in which it should start: the longest chains first."""
        everything = self._everything()
        wanted = set(self.arguments.trainings or [task.name for task in everything])
        for task in reversed(everything):
            if task.name in wanted:
                wanted.update(task.needs)
        found = []
        for task in everything:
            if task.name in wanted or ("--task" in task.words and wanted.issuperset(task.needs)):
                wanted.add(task.name)
                found.append(task)
        if "vq" in wanted and not self.arguments.tokenizer:
            raise UserError("give --tokenizer, the release of the 2D VQGAN, or --trainings that do without")
        after = tuple(task.name for task in found)
        return [*found, self._measurement("speed", after, self._all_timed, alone=True)]

    def _everything(self) -> list[Command]:
        data = f"data.path={Path(self.arguments.data).absolute()}"
        chosen = (
            ("reconstruction-titok_stage2", "reconstruction-titok_single")
            if self.arguments.titok == "better"
            else (f"titok_{self.arguments.titok}",)
        )
        train, measure = self._training, self._measurement
        found = [
            Command("vq", [], self.out / "vq.log", done=(self.release("vq") / CONFIG).is_file),
            # Without a discriminator: in its first 300 steps the L1 error rose from 0.129 to 0.172.
            train(
                "vae", (), data, f"tokenizer.{VAE_CHANNELS}", "task.ema.decay=0.995", "task.loss.adversarial_weight=0"
            ),
            train(
                *("titok_stage1", ("vq",), data, *TITOK_SIZE, f"task.teacher={self.release('vq')}"),
                "task.ema.decay=0.998",
            ),
            train(
                *("titok_single", (), data, *TITOK_SIZE, "task.ema.decay=0.998"),
                "task.loss.adversarial_start=2000",
            ),
            measure("reference", (), self.reference.is_file),
            train(
                *("flextok", ("vae",), data, f"task.vae={self.release('vae')}"),
                *(f"tokenizer.vae.{VAE_CHANNELS}", "task.compile=true", "every.validate=1000"),
                *("task.lr_schedule.warmup=300", "task.lr_schedule.shape=cosine"),
                *("task.lr_schedule.total=8000", "task.lr_schedule.end=0.1"),
            ),
            train(
                *("titok_stage2", ("titok_stage1",), data, f"task.init_from={self.release('titok_stage1')}"),
                *(*TITOK_SIZE, "task.optimizer.lr=2e-4", "task.ema.decay=0.995", "task.loss.adversarial_start=250"),
            ),
            measure("codes-flextok", ("flextok",), (self.out / "codes" / "flextok" / "done").is_file),
            train("flextok_ar", ("codes-flextok",), *self._on_codes("flextok"), "experiment=cifar10_flextok_ar"),
            *(
                measure(f"reconstruction-{name}", (name, "reference"), self._scored(name))
                for name in ("titok_single", "titok_stage2")
            ),
            measure("codes-titok", chosen, (self.out / "codes" / "titok" / "done").is_file),
            train("titok_ar", ("codes-titok",), *self._on_codes("titok"), "experiment=cifar10_raster"),
            train("titok_maskgit", ("codes-titok",), *self._on_codes("titok"), "experiment=cifar10_maskgit"),
            measure("reconstruction-vq", ("vq", "reference"), self._scored("vq")),
            measure("lengths-flextok", ("flextok", "reference"), (self.out / "coarse_to_fine.png").is_file),
        ]
        for training in dict.fromkeys(plan.training for plan in self.plans()):
            needs = ("reference",) if training == "raster" else ("reference", training)
            found.append(measure(f"samples-{training}", needs, self._sampled(training)))
        return found

    def plans(self) -> list[scores.Plan]:
        """Every way of generating that is measured: those of all generators but trainings that were not asked for."""
        found = [scores.Plan(f"flextok-ar-{k}", "flextok_ar", num_tokens=k) for k in PLAN_TOKENS]
        found.append(scores.Plan("titok-ar", "titok_ar"))
        found += [scores.Plan(f"titok-{name}", "titok_maskgit", masked=name) for name in scores.MASKED]
        if self.arguments.raster:
            found.append(scores.Plan("vq-raster", "raster"))
        left_out = SECONDS.keys() - set(self.arguments.trainings or SECONDS)
        return [plan for plan in found if plan.training not in left_out]

    def plans_of(self, training: str) -> list[scores.Plan]:
        """The ways of generating with one generator."""
        return [plan for plan in self.plans() if plan.training == training]

    def _training(self, name: str, needs: tuple[str, ...], *words: str) -> Command:
        minutes, seconds = divmod(self.seconds[name], 60)
        experiment = [] if any(word.startswith("experiment=") for word in words) else [f"experiment=cifar10_{name}"]
        limit = f"trainer.max_time=00:00:{minutes:02d}:{seconds:02d}"
        every = [*experiment, *SHORT, "every.checkpoint=500", *words, limit, *self._overrides(name)]
        return replace(training_command(name, every, self.out / name), needs=needs, done=self.release(name).is_dir)

    def _overrides(self, training: str) -> Iterator[str]:
        """Words of ``--set`` for a training: those for all, and those with its name in front."""
        for word in self.arguments.set:
            name, colon, rest = word.partition(":")
            if not colon or name not in SECONDS:
                yield word
            elif name == training:
                yield rest

    def _on_codes(self, kind: str) -> tuple[str, ...]:
        tokenizer = self.titok() if kind == "titok" else kind
        return (
            *("data=codes", f"data.path={self.out / 'codes' / kind}", f"task.tokenizer={self.release(tokenizer)}"),
            *("task.ema.decay=0.998", "every.checkpoint=1000"),
        )

    def _measurement(
        self, name: str, needs: tuple[str, ...], done: Callable[[], bool], *, alone: bool = False
    ) -> Command:
        words = [sys.executable, "-m", "benchmarks.compare_tokenizers", *self.arguments.words, "--task", name]
        return Command(name, words, self.out / "logs" / f"{name}.log", needs, done, alone, folder=Path.cwd())

    def _scored(self, name: str) -> Callable[[], bool]:
        return lambda: any(row["tokenizer"] == name for row in rows(self.out, "reconstruction"))

    def _sampled(self, training: str) -> Callable[[], bool]:
        labels = {plan.label for plan in self.plans_of(training)}
        return lambda: {row["plan"] for row in rows(self.out, "samples") if row["final"]} >= labels

    def _all_timed(self) -> bool:
        return {row["plan"] for row in rows(self.out, "speed")} >= {plan.label for plan in self.plans()}

    def run(self) -> None:
        """Run what is not done yet, several at once.

        Raises:
            UserError: at the end, if a task failed; whatever does not need its result is done nevertheless.
            SystemExit: if all was stopped before the end.
        """
        try:
            run_side_by_side(
                self.tasks, per_device=self.arguments.jobs, limit=self.arguments.limit, finished=self._finished
            )
        except SystemExit:
            print("stopped; finished work is kept; repeat the command to go on", flush=True)
            raise

    def _finished(self, task: Command, seconds: float) -> None:
        row = {"task": task.name, "seconds": round(seconds, 1), "budget_s": self.seconds.get(task.name)}
        add(self.out, "tasks", row)

    def measure(self, name: str) -> None:
        """Do one measurement in this process."""
        kind, _, what = name.partition("-")
        bench = scores.Bench(self.out, self.arguments, self.reference)
        if kind == "reference":
            bench.make_reference()
        elif kind == "codes":
            bench.cache(what, self.release(self.titok() if what == "titok" else what))
        elif kind == "reconstruction":
            bench.reconstruct(what, self.release(what))
        elif kind == "lengths":
            bench.lengths(self.release(what))
        elif kind == "samples":
            bench.sample(self.plans_of(what), self.release(what))
        else:
            bench.speed([(plan, self.release(plan.training)) for plan in self.plans()])


def _budget(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    if name not in SECONDS or not value.isdigit() or not 0 < int(value) < 3600:
        raise argparse.ArgumentTypeError(f"{text}: give <training>=<seconds> with one of {', '.join(SECONDS)}")
    return name, int(value)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder in Hugging Face layout")
    parser.add_argument("--features", required=True, help="TorchScript extractor of (features, class logits)")
    parser.add_argument("--out", required=True, help="where runs and results go; repeating the command goes on there")
    parser.add_argument("--tokenizer", help="release of the 2D VQGAN: teacher and comparison")
    parser.add_argument(
        "--await-tokenizer", action="store_true", help="begin before that release is there, wait for it"
    )
    parser.add_argument("--raster", help="release of a raster generator on its tokens, for comparison")
    parser.add_argument(
        "--reference", help="statistics of the training pictures; OUT/reference.npz, made where missing"
    )
    parser.add_argument("--titok", choices=("stage2", "single", "better"), default="better", help="tokens generated")
    parser.add_argument("--seconds", type=_budget, nargs="+", default=[], metavar="TRAINING=SECONDS", help=f"{SECONDS}")
    parser.add_argument("--trainings", choices=SECONDS, nargs="+", help="these and what they need, instead of all")
    parser.add_argument("--jobs", type=int, default=3, help="processes at once per device")
    parser.add_argument("--limit", type=float, default=0, help="seconds after which to stop, to be continued; 0 = none")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.5, 2.5, 4.0], help="mean guidance weights")
    parser.add_argument("--sweep", type=int, default=5000, help="samples per guidance scale")
    parser.add_argument("--samples", type=int, default=10000, help="samples at the best scale")
    parser.add_argument("--batch-size", type=int, default=1000)
    parser.add_argument("--engine", choices=("auto", "eager", "graph"), default="auto", help="of generation")
    parser.add_argument("--set", nargs="*", default=[], metavar="[TRAINING:]key=value", help="overrides")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("table",), help="make the tables of the rows so far and end")
    chosen = parser.parse_args(arguments)
    chosen.words = list(sys.argv[1:] if arguments is None else arguments)
    chosen.seconds = dict(chosen.seconds)
    for name in ("data", "tokenizer", "raster"):
        if name == "tokenizer" and chosen.await_tokenizer:
            continue
        if (folder := getattr(chosen, name)) and not Path(folder).is_dir():
            parser.error(f"--{name} {folder} is no folder")
    for name in ("features", "reference"):
        if (file := getattr(chosen, name)) and not Path(file).is_file():
            parser.error(f"--{name} {file} is no file")
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not done yet, then make the tables."""
    given = parse(arguments)
    with reported():
        comparison = Comparison(given)
        if given.task:
            comparison.measure(given.task)
            return
        if not given.only:
            comparison.check_same()
            (comparison.out / "versions.json").write_text(json.dumps(versions()))
            try:
                comparison.run()
            finally:
                tables.write(comparison.out)
            return
        tables.write(comparison.out)


if __name__ == "__main__":
    main()
