"""The comparison on video at a tiny size: stopped in a training, gone on, every stage."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import compare_video, video_proxy
from benchmarks.side_by_side import ROOT

DATA = ["image_size=16", "num_frames=5", "digit_size=8", "train_clips=40", "val_clips=20", "min_speed=1", "max_speed=2"]
WORDS = [
    *("--device", "cpu", "--orders", "neighboring", "--jobs", "1", "--workers", "0"),
    *("--data", *DATA),
    *("--tokenizer-seconds", "600", "--steps", "2"),
    *("--scales", "1", "2", "--temperatures", "1", "--samples", "10", "--final", "20", "--batch-size", "10"),
    *("--decode-size", "tiny", "--decode-grids", "2x4x4", "--decode-batch", "1", "2", "--decode-repeats", "1"),
    *("--set-tokenizer", "trainer=cpu", "num_threads=1", "trainer.max_steps=40", "task.batch_size=4"),
    *("task.lr_schedule.warmup=1",),
    *("task.num_workers=0", "tokenizer.image_size=16", "tokenizer.num_frames=5", "tokenizer.base_channels=8"),
    *("tokenizer.multipliers=[1,1,1]", "tokenizer.z_channels=8", "tokenizer.num_res_blocks=1", "every.pictures=0"),
    *("every.log=1", "tokenizer.norm_groups=4", "trainer.precision=bf16-mixed"),
    *("--set-generator", "trainer=cpu", "num_threads=1", "task.batch_size=8", "task.lr_schedule.warmup=1"),
    *("every.validate=0", "generator.dim=16", "generator.depth=1", "generator.heads=2"),
]


@pytest.mark.slow
def test_stopped_in_a_training_and_gone_on(tmp_path, capsys):
    out = tmp_path / "out"
    video_proxy.main(
        ["--out", str(out / "proxy.pt"), "--data", *DATA, "--steps", "2", "--clips", "20", "--device", "cpu"]
    )
    command = ["--out", str(out), *WORDS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.compare_video", *command], cwd=ROOT, env=environment)
    log, deadline = out / "tokenizer" / "train.log", time.monotonic() + 120
    while not (log.is_file() and "tokenizer 1/40" in log.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert "stopped by SIGTERM" in log.read_text()
    assert not (out / "tokenizer" / "release").exists()

    compare_video.main(command)
    assert "continuing from" in log.read_text()
    (row,) = csv.DictReader((out / "video.csv").open())
    assert (row["order"], row["passes"], row["clips"]) == ("neighboring", "4", "20")
    assert float(row["fd_proxy"]) > 0
    assert float(row["clips_per_s_pixels"]) > 0
    assert 0 <= float(row["digit_accuracy"]) <= 1
    (size,) = csv.DictReader((out / "decode.csv").open())
    assert (size["grid"], size["passes"]) == ("2x4x4", "8")
    reference = {row["what"]: row for row in map(json.loads, (out / "reference.jsonl").read_text().splitlines())}
    assert reference["real clips (the reference)"]["fd_proxy"] < 1e-6
    assert reference["real clips (the reference)"]["steady"] == 1
    assert reference["reconstructions"]["tokens"] == [2, 2, 2]
    for name in ("neighboring", "reconstructions", "real"):
        assert (out / "pictures" / f"{name}.gif").stat().st_size < 400_000
        assert (out / "pictures" / f"{name}.png").is_file()
    assert (out / "video.png").is_file()
    assert "FD-proxy" in (out / "video.md").read_text()

    # Repeated: nothing is made again, but for a score that was cut off.
    rows = (out / "score.jsonl").read_text().splitlines()
    (out / "score.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    capsys.readouterr()
    compare_video.main(command)
    assert capsys.readouterr().out.count('{"') == 1
    again = (out / "score.jsonl").read_text().splitlines()
    assert json.loads(again[-1]) == pytest.approx(json.loads(rows[-1]))

    with pytest.raises(SystemExit) as stop:
        compare_video.main([*command, "--final", "30"])
    assert stop.value.code == 2
    assert "has other final" in capsys.readouterr().err
