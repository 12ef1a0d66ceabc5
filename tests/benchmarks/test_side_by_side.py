"""Commands side by side: places, failures, and a stop that reaches all of them."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import side_by_side
from benchmarks.side_by_side import ROOT, Command, only_device, run_side_by_side
from vgen.errors import UserError


def python(name, code, folder, *needs, alone=False, done=None):
    return Command(name, [sys.executable, "-c", code], folder / f"{name}.log", needs, done, alone)


def test_devices_are_those_that_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    names = [only_device(i, {"CUDA_VISIBLE_DEVICES": "5,7"})["CUDA_VISIBLE_DEVICES"] for i in range(3)]
    assert names == ["5", "7", "5"]
    assert only_device(3, {})["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert only_device(3, {"A": "b"}) == {"A": "b"}


def test_a_failure_is_told_and_leaves_the_others_running(tmp_path, capsys):
    commands = [
        python("bad", "raise SystemExit('no such thing')", tmp_path),
        python("good", f"import time; time.sleep(1); open({str(tmp_path / 'done')!r}, 'w')", tmp_path),
    ]
    with pytest.raises(UserError, match=f"failed: bad; see {tmp_path / 'bad.log'}"):
        run_side_by_side(commands, per_device=2)
    assert "bad failed with status 1:\nno such thing" in capsys.readouterr().out
    assert (tmp_path / "done").is_file()


def test_commands_run_after_what_they_need_and_a_failure_stops_only_what_needs_it(tmp_path, capsys):
    def touches(name, *needs, code="", **options):
        file = tmp_path / name
        ending = f"\nfrom pathlib import Path\nPath({str(file)!r}).touch()"
        return python(name, code + ending, tmp_path, *needs, done=file.is_file, **options)

    commands = [
        touches("bad", code="raise SystemExit('broken')"),
        touches("after-bad", "bad"),
        python("without-result", "", tmp_path, done=(tmp_path / "never").is_file),
        touches("one"),
        touches("two", "one", code=f"assert __import__('os').path.exists({str(tmp_path / 'one')!r})"),
        touches("last", "bad", "after-bad", "one", "two", alone=True),
    ]
    finished = []
    with pytest.raises(UserError, match="failed: bad, without-result;"):
        run_side_by_side(commands, per_device=2, finished=lambda command, seconds: finished.append(command.name))
    assert finished == ["one", "two", "last"]
    told = capsys.readouterr().out
    assert "bad failed with status 1:\nbroken" in told
    assert "without-result ended without its result" in told
    # What is done is not done again, and what failed is tried again.
    (tmp_path / "bad").touch()
    (tmp_path / "never").touch()
    run_side_by_side(lambda: commands, per_device=2, finished=lambda command, seconds: finished.append(command.name))
    assert finished == ["one", "two", "last", "after-bad"]


def test_a_command_that_wants_to_be_alone_is(tmp_path):
    def timed(name, **options):
        code = "import time; b = time.time(); time.sleep(0.5); print(b, time.time())"
        return python(name, code, tmp_path, **options)

    names = ("first", "alone", "last")
    run_side_by_side([timed(name, alone=name == "alone") for name in names], per_device=3)
    times = {name: [float(part) for part in (tmp_path / f"{name}.log").read_text().split()] for name in names}
    for other in ("first", "last"):
        assert times["alone"][1] <= times[other][0] or times[other][1] <= times["alone"][0]
    run_side_by_side([timed("alone", alone=True), timed("last")], per_device=3)
    times = {name: [float(part) for part in (tmp_path / f"{name}.log").read_text().split()[2:]] for name in names[1:]}
    assert times["alone"][1] <= times["last"][0]


def test_no_place_for_commands_is_refused(tmp_path):
    with pytest.raises(UserError, match="give 1 or more"):
        run_side_by_side([python("never", "", tmp_path)], per_device=0)


def test_the_limit_stops_all(tmp_path):
    began = time.monotonic()
    with pytest.raises(SystemExit):
        run_side_by_side([python("slow", "import time; time.sleep(60)", tmp_path)], per_device=1, limit=1)
    assert time.monotonic() - began < 30


def test_a_free_device_comes_before_a_second_place_on_a_busy_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert side_by_side._emptiest([1, 2, 3], {0: None}) == 1
    assert side_by_side._emptiest([0, 2, 3], {1: None}) == 0
    assert side_by_side._emptiest([2, 3], {0: None, 1: None}) == 2
    assert side_by_side._emptiest([0, 2], {1: None, 3: None}) == 0


@pytest.mark.parametrize(("given", "count", "threads"), [(None, 3, "6"), ("5", 3, "5"), (None, 1, "None")])
def test_commands_share_the_cores(given, count, threads, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(32))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    show = "import os; print(os.environ.get('OMP_NUM_THREADS'))"
    done = [python(f"done {number}", show, tmp_path, done=lambda: True) for number in range(2)]
    run_side_by_side(done + [python(str(number), show, tmp_path) for number in range(count)], per_device=3)
    assert [(tmp_path / f"{number}.log").read_text().strip() for number in range(count)] == [threads] * count


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_every_command(number, tmp_path):
    child = (
        "import pathlib, signal, sys, time\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), here.with_suffix('.saved').touch(), sys.exit(3)))\n"
        "here.touch()\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import pathlib, sys\n"
        "from benchmarks.side_by_side import Command, run_side_by_side, stoppable\n"
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
    process.send_signal(number)
    time.sleep(0.5)
    # An impatient second one does not keep the commands from saving.
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert (tmp_path / "a.saved").is_file()
    assert (tmp_path / "b.saved").is_file()
