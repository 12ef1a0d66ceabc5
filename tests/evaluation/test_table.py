import csv
import json
import subprocess
import sys

import pytest
from PIL import Image

from tests.evaluation.helpers import TinyExtractor, save_generator, save_npz, save_script, save_tokenizer
from tests.paths import ROOT
from vgen.errors import UserError
from vgen.evaluation.report import SCHEMA
from vgen.evaluation.table import shown_score, write_table


def report(folder, name, *, scale, order, fid, speed):
    document = {
        "schema": SCHEMA,
        "metrics": {"fid": fid, "is": 1.0},
        "n_samples": 10,
        "n_reference": 10,
        "sampling": {"schedule": order, "guidance": {"scale": scale}, "images_per_s": speed, "forward_passes": 4},
    }
    (folder / name).mkdir(parents=True)
    (folder / name / "report.json").write_text(json.dumps(document))


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_table_of_reports_with_its_two_pictures(tmp_path):
    report(tmp_path, "b", scale=2.0, order="raster", fid=5.0, speed=10.0)
    report(tmp_path, "a", scale=1.5, order="raster", fid=4.0, speed=11.0)
    report(tmp_path, "c", scale=1.5, order="parallel", fid=6.0, speed=40.0)
    found = rows(write_table(tmp_path))
    assert [line["run"] for line in found] == ["c", "a", "b"]
    assert [float(line["fid"]) for line in found] == [6, 4, 5]
    for name in ("fid_vs_scale.png", "fid_vs_images_per_s.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (900, 600)
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_a_damaged_report_and_none_at_all(tmp_path):
    with pytest.raises(UserError, match="holds no report"):
        write_table(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "report.json").write_text("{}")
    with pytest.raises(UserError, match=r"a/report\.json is not a report"):
        write_table(tmp_path)


def test_which_score_is_shown():
    assert shown_score(["is", "fd_tiny", "fid"]) == "fid"
    assert shown_score(["kid_std", "fd_tiny"]) == "fd_tiny"
    assert shown_score(["psnr"]) is None


@pytest.fixture
def sweep(tmp_path):
    save_npz(tmp_path / "real.npz", 40, seed=2)
    save_script(TinyExtractor(), tmp_path / "tiny.pt")
    generator = save_generator(tmp_path / "generator", save_tokenizer(tmp_path / "tokenizer"))
    return [
        "-m",
        f"checkpoint={generator}",
        f"reference={tmp_path}/real.npz",
        f"evaluation.features={tmp_path}/tiny.pt",
        "device=cpu",
        "num_samples=5",
        "metrics=[fd,isc]",
        "evaluation.isc_splits=1",
        "sampling.guidance.scale=1,2",
        f"out={tmp_path}/sweep",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_multirun_writes_one_table(sweep, processes, command, tmp_path):
    if processes == 1:
        status, _, err = command("evaluate.py", *sweep)
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        words = [*torchrun, str(ROOT / "evaluate.py"), *sweep]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        status, err = done.returncode, done.stderr
    assert status == 0, err[-3000:]
    found = rows(tmp_path / "sweep" / "table.csv")
    assert [float(line["scale"]) for line in found] == [1, 2]
    assert [line["run"].rpartition("-")[0] for line in found] == ["guidance.scale=1", "guidance.scale=2"]
    assert all(float(line["fd_tiny"]) > 0 and float(line["images_per_s"]) > 0 for line in found)
    assert (tmp_path / "sweep" / "fd_tiny_vs_scale.png").is_file()
    assert len(list((tmp_path / "sweep").glob("*/report.json"))) == 2
