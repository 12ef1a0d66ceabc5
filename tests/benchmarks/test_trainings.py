"""Commands side by side: places, failures, and a stop that reaches all of them."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.trainings import ROOT, Command, only_device, run_side_by_side
from vgen.errors import UserError


def python(name, code, folder):
    return Command(name, [sys.executable, "-c", code], folder / f"{name}.log")


def test_devices_are_those_that_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    names = [only_device(i, {"CUDA_VISIBLE_DEVICES": "5,7"})["CUDA_VISIBLE_DEVICES"] for i in range(3)]
    assert names == ["5", "7", "5"]
    assert only_device(3, {})["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert only_device(3, {"A": "b"}) == {"A": "b"}


def test_a_failure_is_told_and_leaves_the_others_running(tmp_path):
    commands = [
        python("bad", "raise SystemExit('no such thing')", tmp_path),
        python("good", f"import time; time.sleep(1); open({str(tmp_path / 'done')!r}, 'w')", tmp_path),
    ]
    with pytest.raises(UserError, match="bad failed with status 1:\nno such thing"):
        run_side_by_side(commands, per_device=2)
    assert (tmp_path / "done").is_file()


@pytest.mark.parametrize(("given", "count", "threads"), [(None, 3, "6"), ("5", 3, "5"), (None, 1, "None")])
def test_commands_share_the_cores(given, count, threads, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(32))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    show = "import os; print(os.environ.get('OMP_NUM_THREADS'))"
    run_side_by_side([python(str(number), show, tmp_path) for number in range(count)], per_device=3)
    assert [(tmp_path / f"{number}.log").read_text().strip() for number in range(count)] == [threads] * count


def test_a_stop_reaches_every_command(tmp_path):
    child = (
        "import pathlib, signal, sys, time\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "signal.signal(signal.SIGTERM, lambda *_: (here.with_suffix('.saved').touch(), sys.exit(3)))\n"
        "here.touch()\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import pathlib, sys\n"
        "from benchmarks.trainings import Command, run_side_by_side, stoppable\n"
        f"child, folder = {child!r}, pathlib.Path({str(tmp_path)!r})\n"
        "commands = [Command(n, [sys.executable, '-c', child, str(folder / n)], folder / 'log') for n in 'ab']\n"
        "with stoppable():\n"
        "    run_side_by_side(commands, per_device=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not ((tmp_path / "a").is_file() and (tmp_path / "b").is_file()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert (tmp_path / "a.saved").is_file()
    assert (tmp_path / "b.saved").is_file()
