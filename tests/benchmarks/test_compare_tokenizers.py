"""The comparison of tokenizers: what it starts and when, its measurements at a tiny size, its training commands."""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from benchmarks import compare_tokenizers, tokenizer_scores, tokenizer_tables
from benchmarks.compare_tokenizers import Comparison, parse
from benchmarks.measurements import add, rows
from benchmarks.side_by_side import ROOT, Command
from tests.benchmarks.test_compare_orders import write_pictures
from tests.evaluation.helpers import CLASSES, TinyExtractor, save_generator, save_script, save_tokenizer
from tests.paths import CONFIGS
from vgen.checkpoints.release import build, save_release
from vgen.errors import UserError
from vgen.training.settings import check, resolve

VIT = {"width": 16, "layers": 1, "heads": 2}
TITOK = {
    "_target_": "vgen.tokenizers.titok.TiTok",
    "image_size": 12,
    "patch_size": 4,
    "num_latent_tokens": 6,
    "token_size": 4,
    "encoder": VIT,
    "decoder": VIT,
    "codebook_size": 16,
}
FLEXTOK = {
    "_target_": "vgen.tokenizers.flextok.FlexTok",
    "vae": {
        "_target_": "vgen.tokenizers.autoencoder_kl.AutoencoderKL",
        "image_size": 12,
        "latent_channels": 4,
        "block_channels": [8, 8],
        "layers_per_block": 1,
        "norm_groups": 4,
    },
    "num_tokens": 64,
    "levels": [4, 4],
    "encoder": {"dim": 64, "depth": 1},
    "decoder": {"dim": 64, "depth": 1},
}


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """A command over a tiny data set."""
    data = write_pictures(tmp_path / "data")
    return [
        *("--data", str(data), "--features", str(save_script(TinyExtractor(), tmp_path / "tiny.pt"))),
        *("--tokenizer", str(save_tokenizer(tmp_path / "vq")), "--out", str(tmp_path / "out")),
        *("--scales", "1.5", "2.5", "--sweep", "16", "--samples", "24", "--batch-size", "12"),
    ]


def _save(folder: Path, network: dict, **options) -> Path:
    torch.manual_seed(0)
    return save_release(folder, build(network), network, **options)


def _save_generator(folder: Path, tokenizer: Path, tokens: int, schedule: dict, **options) -> None:
    network = {
        "_target_": "vgen.generators.transformer.Transformer",
        "vocab_size": 16,
        "grid": [tokens],
        "condition": {"_target_": "vgen.generators.conditioning.ClassCondition", "num_classes": CLASSES, "dim": 16},
        **{"num_readouts": 1, "num_learned": 0, "dim": 16, "depth": 1, "heads": 2, "ffn_multiple_of": 16},
        **options,
    }
    _save(folder, network, kind="generator", extra={"schedule": schedule}, tokenizer=tokenizer)


def test_every_measurement_and_the_tables(arguments, tmp_path, monkeypatch):
    out = tmp_path / "out"
    raster = save_generator(tmp_path / "raster", tmp_path / "vq")
    comparison = Comparison(parse([*arguments, "--raster", str(raster)]))
    comparison.check_same()
    for name in ("titok_single", "titok_stage2"):
        _save(out / name / "release", TITOK, kind="tokenizer")
    _save(out / "flextok" / "release", FLEXTOK, kind="tokenizer")
    one_by_one = {"_target_": "vgen.schedules.raster.raster", "_partial_": True}
    masked = {"_target_": "vgen.schedules.masked.masked", "_partial_": True, "steps": 4}
    titok = out / "titok_single" / "release"
    _save_generator(out / "titok_ar" / "release", titok, 6, one_by_one)
    for name in tokenizer_scores.MASKED:
        monkeypatch.setitem(tokenizer_scores.MASKED[name], "steps", 3)
    _save_generator(out / "titok_maskgit" / "release", titok, 6, masked, mask_token=True)
    _save_generator(out / "flextok_ar" / "release", out / "flextok" / "release", 64, one_by_one)

    measurements = [task for task in comparison.tasks() if "--task" in task.words]
    for task in measurements:
        assert not task.done(), task.name
        comparison.measure(task.name)
        assert task.done(), task.name
    tokenizers = {row["tokenizer"]: row for row in rows(out, "reconstruction")}
    assert tokenizers.keys() == {"vq", "titok_single", "titok_stage2"}
    assert all(row["fd"] > 0 and 0 < row["psnr"] < 50 for row in tokenizers.values())
    assert [row["tokens"] for row in rows(out, "lengths")] == [1, 2, 4, 8, 16, 32, 64]

    tokenizer_tables.write(out)
    table = list(csv.DictReader((out / "generators.csv").open()))
    assert [(row["plan"], row["tokens"]) for row in table] == [
        *((f"flextok-ar-{k}", str(k)) for k in (4, 16, 64)),
        *(("titok-ar", "6"), ("titok-maskgit", "6"), ("titok-maskgit-plain", "6"), ("vq-raster", "36")),
    ]
    assert all(float(row["fd"]) > 0 and float(row["images_per_s"]) > 0 for row in table)
    assert (out / "lengths.png").is_file()
    assert (out / "coarse_to_fine.png").is_file()
    assert (out / "tokenizers.md").read_text().count("\n") == 2 + 3 + 7

    # A scale that was scored before a kill is not sampled again, and half a row does not count.
    before = [row for row in rows(out, "samples") if row["plan"] == "titok-ar"]
    tried = {row["scale"]: row["fd"] for row in before if not row["final"]}
    assert list(tried)[:2] == [1.5, 2.5]
    assert before[-1]["final"]
    assert before[-1]["scale"] == min(tried, key=tried.__getitem__)
    lines = [json.dumps(row) for row in before]
    (out / "samples.jsonl").write_text("\n".join(lines[:1]) + "\n" + lines[1][:20])
    comparison.measure("samples-titok_ar")
    again = rows(out, "samples")
    assert [(row["scale"], row["final"]) for row in again] == [(row["scale"], row["final"]) for row in before]
    assert [row["fd"] for row in again] == pytest.approx([row["fd"] for row in before])


def test_the_better_titok_is_generated(arguments, tmp_path):
    comparison = Comparison(parse(arguments))
    for name, fd in (("titok_single", 3.0), ("titok_stage2", 4.0)):
        add(tmp_path / "out", "reconstruction", {"tokenizer": name, "fd": fd})
    assert comparison.titok() == "titok_single"
    assert Comparison(parse([*arguments, "--titok", "stage2"])).titok() == "titok_stage2"


def test_training_commands_compose(arguments):
    words = ["--seconds", "vae=100", "--set", "task.clip=0.5", "vae:task.optimizer.lr=1e-5"]
    tasks = [task for task in Comparison(parse([*arguments, *words])).tasks() if "train.py" in task.words]
    assert {task.name for task in tasks} == set(compare_tokenizers.SECONDS)
    for task in tasks:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = resolve(compose("train", list(task.words[2:])))
        check(config)
        assert config["task"]["clip"] == 0.5
        assert (config["task"]["optimizer"]["lr"] == 1e-5) == (task.name == "vae")
        assert config["trainer"]["max_time"] == ("00:00:01:40" if task.name == "vae" else config["trainer"]["max_time"])
        made_of = "codes" if task.name.endswith(("_ar", "maskgit")) else "parquet"
        assert config["data"]["_target_"].endswith(made_of)


def test_some_trainings_with_what_they_need_and_what_measures_them(arguments):
    without = [*arguments]
    place = without.index("--tokenizer")
    del without[place : place + 2]

    def names(*words: str) -> list[str]:
        return [task.name for task in Comparison(parse([*without, *words])).tasks()]

    flextok = ["vae", "reference", "flextok", "codes-flextok", "flextok_ar", "lengths-flextok", "samples-flextok_ar"]
    assert names("--trainings", "flextok_ar") == [*flextok, "speed"]
    some = Comparison(parse([*without, "--trainings", "titok_single"]))
    assert [task.name for task in some.tasks()] == ["titok_single", "reference", "reconstruction-titok_single", "speed"]
    assert some.tasks()[-1].done()
    assert {plan.training for plan in some.plans()} == set()
    with pytest.raises(UserError, match="give --tokenizer"):
        names("--trainings", "titok_stage2")
    with pytest.raises(UserError, match="give --tokenizer"):
        names()
    everything = {task.name for task in Comparison(parse(arguments)).tasks()}
    assert {*compare_tokenizers.SECONDS, "vq", "reconstruction-vq", *flextok} < everything


def test_a_tokenizer_that_another_program_makes_is_waited_for(arguments, tmp_path, monkeypatch):
    comparison = Comparison(parse(arguments))
    code = f"from pathlib import Path; assert Path({str(tmp_path / 'released')!r}).exists(); "
    code += f"Path({str(tmp_path / 'user')!r}).touch()"
    tasks = [
        Command("vq", [], tmp_path / "log", done=(tmp_path / "released").is_file),
        Command("user", [sys.executable, "-c", code], tmp_path / "log", ("vq",), (tmp_path / "user").is_file),
    ]
    monkeypatch.setattr(comparison, "tasks", lambda: tasks)
    code = f"import time; time.sleep(1.5); open({str(tmp_path / 'released')!r}, 'w').close()"
    other = subprocess.Popen([sys.executable, "-c", code])
    comparison.run()
    assert other.wait(10) == 0
    assert (tmp_path / "user").is_file()
    assert [row["task"] for row in rows(comparison.out, "tasks")] == ["user"]
    words = list(arguments)
    words[words.index("--tokenizer") + 1] = str(tmp_path / "later")
    with pytest.raises(SystemExit):
        parse(words)
    later = Comparison(parse([*words, "--await-tokenizer"]))
    assert {"vq"} == {task.name for task in later.tasks() if not task.words and not task.done()}


def test_a_stop_reaches_every_process_once_and_the_command_goes_on(arguments, tmp_path):
    script = tmp_path / "stopped.py"
    script.write_text(
        "import sys, signal, time\nfrom pathlib import Path\n"
        "saved = Path(sys.argv[1])\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), saved.open('a').write('x'), sys.exit(143)))\n"
        "saved.with_suffix('.up').touch()\n"
        "time.sleep(0 if saved.exists() else 60)\n"
        "saved.with_suffix('.done').touch()\n"
    )
    saved = tmp_path / "saved"
    driver = (
        "import sys\nfrom benchmarks import compare_tokenizers as c\n"
        "from pathlib import Path\n"
        f"task = c.Command('t', [sys.executable, {str(script)!r}, {str(saved)!r}], Path({str(tmp_path / 'log')!r}), "
        f"done=Path({str(saved)!r} + '.done').is_file)\n"
        "c.Comparison.tasks = lambda self: [task]\nc.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", driver, *arguments]
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while not saved.with_suffix(".up").exists():
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGTERM)
    assert first.wait(30) == 128 + signal.SIGTERM
    assert saved.read_text() == "x"
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 0
    assert saved.with_suffix(".done").is_file()


def test_bad_arguments(arguments, tmp_path, capsys):
    for words, message in (
        (["--seconds", "vqe=3"], "one of vae"),
        (["--raster", "nowhere"], "nowhere is no folder"),
    ):
        with pytest.raises(SystemExit):
            parse([*arguments, *words])
        assert message in capsys.readouterr().err
    Comparison(parse(arguments)).check_same()
    # A raster generator may come later, and then stays.
    raster = str(tmp_path / "vq")
    Comparison(parse([*arguments, "--raster", raster])).check_same()
    with pytest.raises(UserError, match="has other raster"):
        Comparison(parse([*arguments, "--raster", str(tmp_path)])).check_same()
    other: argparse.Namespace = parse([*arguments, "--raster", raster, "--samples", "25"])
    with pytest.raises(UserError, match="has other samples"):
        Comparison(other).check_same()
