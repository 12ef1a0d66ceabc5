import json
import subprocess
import sys
from functools import partial

import pytest

from tests.evaluation.helpers import save_npz
from tests.paths import ROOT


@pytest.fixture
def evaluate(command, monkeypatch, tmp_path):
    """Run evaluate.py in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return partial(command, "evaluate.py")


def test_digits_from_an_npz(evaluate, tmp_path):
    save_npz(tmp_path / "samples.npz", 20, seed=0, size=16)
    status, out, _ = evaluate("samples=samples.npz", "data=digits", "evaluation.metrics=[nearest]", "out=sub/r.json")
    assert status == 0
    assert "nearest_ratio" in out
    report = json.loads((tmp_path / "sub" / "r.json").read_text())
    assert (report["n_samples"], report["n_reference"]) == (20, 1500)
    assert (tmp_path / "sub" / "r_nearest.png").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["samples.npz", "sub"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to score"),
        (("samples=gone.npz", "data=digits"), "samples=gone.npz does not exist"),
        (("samples=data.val", "data=parquet"), "data.path"),
        (("samples=data.val", "data=digits", "data.image_size=0"), "data.image_size=0"),
        (("checkpoint=gone", "sampling.temperature=0"), "gone is not a release folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(evaluate, arguments, message):
    status, out, err = evaluate(*arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_an_unknown_key_is_refused(evaluate):
    status, _, err = evaluate("sample=x.npz")
    assert status == 1
    assert "sample" in err
    assert "not in struct" in err


@pytest.mark.parametrize("group", ["default", "fid", "cifar10", "imagenet512_adm_50k", "k600_larp_50k"])
def test_every_group_composes(evaluate, group):
    status, out, _ = evaluate("--cfg", "job", f"evaluation={group}")
    assert status == 0
    assert "metrics:" in out


def test_help_says_how(evaluate):
    status, out, _ = evaluate("--help")
    assert not status
    assert "python evaluate.py samples=" in out
    groups = next(line for line in out.splitlines() if line.startswith("evaluation: "))
    assert {"cifar10", "default", "fid", "imagenet256_adm_50k"} <= set(groups.removeprefix("evaluation: ").split(", "))


def test_as_a_program(tmp_path):
    run = subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), "samples=gone"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
