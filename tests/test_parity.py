"""Our code reproduces the golden cases, and the runner reports every way in which it might not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import parity

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
# Folders without an adapter hold cases that other tests read directly.
SYSTEMS = [path.stem for path in sorted((HERE / "adapters").glob("*.py")) if (GOLDEN / path.stem).is_dir()]
CASES = [path for system in SYSTEMS for path in parity.find_cases(GOLDEN / system)]


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_golden(path):
    verdict = parity.run_case(path)
    assert verdict.ok, str(verdict)


def test_the_first_system_is_covered():
    assert {path.stem for path in CASES} >= {"vq_full_a", "gpt_c2i_a", "vq_loss", "manifest_VQ-16", "image_pipeline"}


@pytest.fixture
def folder(tmp_path):
    """A llamagen folder with one small case."""
    folder = tmp_path / "llamagen"
    folder.mkdir()
    for suffix in (".json", ".safetensors"):
        shutil.copy(GOLDEN / "llamagen" / f"vq_quantizer{suffix}", folder)
    return folder


def change(folder, **changes):
    path = folder / "vq_quantizer.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors.get(name)) for name, change in changes.items()}, path)


def test_one_line_per_case(folder, capsys):
    assert parity.main([str(folder)]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("llamagen/vq_quantizer")
    assert first.endswith(" ok")
    assert last == "1 cases, 0 failed"


@pytest.mark.parametrize(
    ("name", "change_of", "message"),
    [
        ("out.l21_ent0.0.vq_loss", lambda value: value * 1.01, "l21_ent0.0.vq_loss off by"),
        ("out.l21_ent0.0.vq_loss", lambda value: value * torch.nan, "l21_ent0.0.vq_loss off by nan"),
        ("out.l20_ent0.0.indices", lambda value: value + 1, "l20_ent0.0.indices off by"),
        ("out.l20_ent0.0.indices", lambda value: value[:-1], "shape [40] instead of [39]"),
        ("out.l21_ent0.0.new_figure", lambda _: torch.zeros(3), "not compared: l21_ent0.0.new_figure"),
    ],
)
def test_a_wrong_or_uncompared_output_fails(folder, capsys, name, change_of, message):
    change(folder, **{name: change_of})
    assert parity.main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert message in out


def test_unknown_case_unknown_system_and_empty_folder_fail(folder, tmp_path, capsys):
    (folder / "riddle.json").write_text(json.dumps({"config": {}, "tensors": {}}))
    (folder / "broken.json").write_text("{")
    save_file({"out.x": torch.zeros(1)}, folder / "orphan.safetensors")
    other = tmp_path / "no_such_system"
    shutil.copytree(folder, other)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert parity.main([str(folder), str(other), str(empty)]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["llamagen/vq_quantizer"].endswith("ok")
    assert "unknown case" in lines["llamagen/riddle"]
    assert "unreadable" in lines["llamagen/broken"]
    assert "unreadable" in lines["llamagen/orphan"]
    assert "no adapter" in lines["no_such_system/vq_quantizer"]
    assert "no golden case" in lines[f"{empty}:"]


def test_manifest_mismatch_fails_both_ways(tmp_path):
    folder = tmp_path / "llamagen"
    folder.mkdir()
    manifest = json.loads((GOLDEN / "llamagen" / "manifest_VQ-16.json").read_text())
    del manifest["encoder.conv_in.bias"]
    manifest["decoder.extra.weight"] = [3]
    path = folder / "manifest_VQ-16.json"
    path.write_text(json.dumps(manifest))
    line = str(parity.run_case(path))
    assert "1 missing: decoder.extra.weight" in line
    assert "1 unknown: encoder.conv_in.bias" in line


def test_command_line(folder):
    run = subprocess.run([sys.executable, HERE / "parity.py", folder], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "ok" in run.stdout
