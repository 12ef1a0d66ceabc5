"""train.py as a user runs it."""

import subprocess
import sys

import pytest

from tests.paths import ROOT

TINY = ["debug=fast", "num_threads=1", "pictures=1", "task.lr_schedule.warmup=0"]


def train(*overrides: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "train.py", *overrides]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_both_stages_end_to_end(command, tmp_path):
    runs = f"paths.runs={tmp_path}"
    size = ["tokenizer.base_channels=8", "tokenizer.z_channels=8"]
    words = [*TINY, *size, runs, "run_name=tokens", "task.batch_size=16"]
    status, _, first = command("train.py", "experiment=digits_tokenizer", *words)
    assert status == 0, first
    release = tmp_path / "tokens" / "release"
    size = ["generator.dim=16", "generator.heads=2", "task.batch_size=16"]
    second = train("experiment=digits_raster", *TINY, *size, runs, "run_name=raster", f"task.tokenizer={release}")
    assert second.returncode == 0, second.stderr
    for told, folder in ((first, tmp_path / "tokens"), (second.stderr, tmp_path / "raster")):
        pictures = sorted(path.name for path in (folder / "pictures").iterdir())
        assert pictures == ["step-00000002.png", "step-00000004.png"]
        assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + 4 + 2
        assert (folder / "release" / "model.safetensors").is_file()
        assert (folder / "checkpoints" / "last.ckpt").is_file()
        assert (folder / "config.yaml").is_file()
        assert str(folder / "release") in told
        # One line per logged step, since this is no terminal.
        assert "4/4" in told
    assert (tmp_path / "raster" / "release" / "tokenizer" / "model.safetensors").is_file()


def test_a_mistake_ends_with_one_line(tmp_path):
    done = train(f"run_dir={tmp_path}", "trainer.max_steps=0")
    assert done.returncode == 2
    assert done.stderr == "error: trainer.max_steps=0 must be at least 1\n"
    assert list(tmp_path.iterdir()) == []


def test_help_shows_recipes_and_keys():
    done = train("--help")
    assert done.returncode == 0
    for word in ("experiment: ", "digits_raster", "max_steps", "torchrun"):
        assert word in done.stdout
