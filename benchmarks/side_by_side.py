"""Commands side by side on the visible devices, each as soon as what it needs is there.

They share the cores, and a stop is passed on to all of them.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        name: in messages and in what others need.
        words: the command line; none for a result that another program makes and that is waited for.
        log: file that its output is added to.
        needs: names of the commands that must be done before.
        done: whether its result is there; None = once it has ended without an error.
        alone: run it only while nothing else runs, and after failures too, with what there is.
    """

    name: str
    words: Sequence[str]
    log: Path
    needs: tuple[str, ...] = ()
    done: Callable[[], bool] | None = None
    alone: bool = False


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


def run_side_by_side(
    commands: Sequence[Command] | Callable[[], Sequence[Command]],
    *,
    per_device: int,
    limit: float = 0.0,
    finished: Callable[[Command, float], None] | None = None,
) -> None:
    """Run commands, as many at once as there are places; those behind wait for a free one.

    A command that fails leaves the others running, but for those that need it. If this process is stopped, all get
    SIGTERM and the time to save. The cores are shared among those that run at once, unless OMP_NUM_THREADS says how
    many threads each gets.

    Args:
        commands: what to run, those to start first in front; a function where command lines depend on results.
        per_device: commands at once per visible device (or on the CPU).
        limit: seconds after which all are stopped, as if this process were; 0 = none.
        finished: called with every command that has ended well, and its seconds.

    Raises:
        UserError: naming the commands that failed, with the end of their logs.
        SystemExit: at the limit.
    """
    places = max(1, torch.cuda.device_count()) * per_device
    running, failed, ended = dict[int, tuple[Command, subprocess.Popen[bytes], float]](), dict[str, str](), set[str]()
    began_all = reported = time.monotonic()
    try:
        while True:
            for place, (command, process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[place]
                seconds = time.monotonic() - began
                if process.returncode or (command.done and not command.done()):
                    reason = f"{command.name} failed with status {process.returncode}:\n{_tail(command.log, 15)}"
                    failed[command.name] = reason
                    print(reason, flush=True)
                    continue
                ended.add(command.name)
                print(f"{command.name}: {seconds:.0f} s", flush=True)
                if finished:
                    finished(command, seconds)
            if limit and time.monotonic() - began_all > limit:
                raise SystemExit(128 + signal.SIGTERM)
            given = commands() if callable(commands) else commands
            ready = _ready(given, ended, set(failed))
            for command in ready:
                at_work = {other.name for other, _, _ in running.values()}
                free = [place for place in range(places) if place not in running]
                if not command.words or command.name in at_work or not free or (command.alone and running):
                    continue
                place, at_once = _emptiest(free, running), 1 if command.alone else min(places, len(given))
                print(f"{command.name}: started", flush=True)
                running[place] = command, _start(command, _environment(place, at_once)), time.monotonic()
            if not running and all(command.words for command in ready):
                break
            time.sleep(0.2)
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                for command, _, began in running.values():
                    print(f"{command.name}: {reported - began:.0f} s, {_tail(command.log, 1)}", flush=True)
    finally:
        _stop([process for _, process, _ in running.values()])
    if failed:
        raise UserError("\n".join(failed.values()))


def _ready(commands: Sequence[Command], ended: set[str], failed: set[str]) -> list[Command]:
    """Commands that are neither done nor failed, and whose needs are met."""
    over = {command.name for command in commands if command.name in ended or (command.done and command.done())}
    blocked = set(failed)
    for command in commands:
        if blocked & set(command.needs) and not command.alone:
            blocked.add(command.name)
    return [
        command
        for command in commands
        if command.name not in over | failed and not set(command.needs) - over - (blocked if command.alone else set())
    ]


def _emptiest(free: Sequence[int], running: Mapping[int, object]) -> int:
    """The free place on the device with the fewest running, so that a second one is not idle."""
    devices = max(1, torch.cuda.device_count())
    return min(free, key=lambda place: (sum(other % devices == place % devices for other in running), place))


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
