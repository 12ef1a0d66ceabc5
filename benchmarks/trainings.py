"""Commands side by side on the visible devices, which share the cores and pass a stop on to all of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from vgen.errors import UserError

ROOT = Path(__file__).parents[1]
REPORT_SECONDS = 20.0
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Command:
    """A process to run.

    Attributes:
        name: in messages.
        words: the command line.
        log: file that its output is added to.
    """

    name: str
    words: Sequence[str]
    log: Path


def training_command(name: str, words: Sequence[str], folder: Path) -> Command:
    """``train.py`` with the words of a recipe, in a folder of its own; repeated, it goes on from its checkpoint."""
    command = [sys.executable, "train.py", *words, f"run_name={name}", f"run_dir={folder}"]
    return Command(name, command, folder / "train.log")


def only_device(index: int, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that sees one of the devices visible here, counted round and round."""
    mine = dict(os.environ if environment is None else environment)
    count = torch.cuda.device_count()
    if not count:
        return mine
    visible = [name for name in mine.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = visible or [str(number) for number in range(count)]
    return mine | {"CUDA_VISIBLE_DEVICES": names[index % count]}


def _environment(place: int, at_once: int) -> dict[str, str]:
    """The environment of the command at a place: its device, and its share of the cores."""
    if at_once == 1:
        return only_device(place)
    # torch's threads of all cores in every process would stand in each other's way; two shares are left to the
    # processes that prepare data and to ours.
    threads = max(2, len(os.sched_getaffinity(0)) // (at_once + 2))
    return only_device(place, {"OMP_NUM_THREADS": str(threads)} | os.environ)


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM end the program as an exception does, so that whatever runs is stopped in order."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_side_by_side(commands: Sequence[Command], *, per_device: int) -> None:
    """Run commands, as many at once as there are places; those behind wait for a free one.

    A command that fails leaves the others running. If this process is stopped, all get SIGTERM and the time to save.
    The cores are shared among those that run at once, unless OMP_NUM_THREADS says how many threads each gets.

    Args:
        commands: what to run.
        per_device: commands at once per visible device (or on the CPU).

    Raises:
        UserError: naming the commands that failed, with the end of their logs.
    """
    places = max(1, torch.cuda.device_count()) * per_device
    at_once = min(places, len(commands))
    waiting, running, failed = list(commands), dict[int, tuple[Command, subprocess.Popen[bytes], float]](), []
    reported = time.monotonic()
    try:
        while waiting or running:
            for place in range(places):
                if waiting and place not in running:
                    command = waiting.pop(0)
                    running[place] = command, _start(command, _environment(place, at_once)), time.monotonic()
            time.sleep(0.2)
            for place, (command, process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[place]
                if process.returncode:
                    failed.append(f"{command.name} failed with status {process.returncode}:\n{_tail(command.log, 15)}")
                else:
                    print(f"{command.name}: {time.monotonic() - began:.0f} s", flush=True)
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                for command, _, began in running.values():
                    print(f"{command.name}: {reported - began:.0f} s, {_tail(command.log, 1)}", flush=True)
    finally:
        _stop([process for _, process, _ in running.values()])
    if failed:
        raise UserError("\n".join(failed))


def _start(command: Command, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with command.log.open("a") as log:
        # A session of its own: a signal to our group must not reach it beside the one we pass on, since a training
        # takes the second for "stop without saving".
        return subprocess.Popen(
            command.words, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _stop(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Ask processes to save and end; those that do not are ended."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tail(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
