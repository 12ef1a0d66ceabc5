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
        folder: in which it runs.
    """

    name: str
    words: Sequence[str]
    log: Path
    needs: tuple[str, ...] = ()
    done: Callable[[], bool] | None = None
    alone: bool = False
    folder: Path = ROOT


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


@contextmanager
def _stop_asked() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C as they come: an exception at any place could leave a process behind that nobody stops."""
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: asked.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_side_by_side(
    commands: Sequence[Command] | Callable[[], Sequence[Command]],
    *,
    per_device: int,
    limit: float = 0.0,
    finished: Callable[[Command, float], None] | None = None,
) -> None:
    """Run commands, as many at once as there are places; those behind wait for a free one.

    A command that fails leaves the others running, but for those that need it; the end of its log is printed. If this
    process is stopped, all get SIGTERM and the time to save. The cores are shared among those that run at once, unless
    OMP_NUM_THREADS says how many threads each gets.

    Args:
        commands: what to run, those to start first in front; a function where command lines depend on results.
        per_device: commands at once per visible device (or on the CPU), at least 1.
        limit: seconds after which all are stopped, as if this process were; 0 = none.
        finished: called with every command that has ended well, and its seconds.

    Raises:
        UserError: at the end, naming the commands that failed and their logs.
        SystemExit: if this process was stopped, or at the limit.
    """
    if per_device < 1:
        raise UserError(f"{per_device} commands at once per device are none; give 1 or more")
    places = max(1, torch.cuda.device_count()) * per_device
    running, failed, ended = dict[int, tuple[Command, subprocess.Popen[bytes], float]](), dict[str, Path](), set[str]()
    began_all = reported = time.monotonic()
    with _stop_asked() as asked:
        try:
            while True:
                for place, (command, process, began) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[place]
                    seconds = time.monotonic() - began
                    if reason := _why_failed(command, process.returncode):
                        failed[command.name] = command.log
                        print(f"{command.name} {reason}:\n{_tail(command.log, 15)}", flush=True)
                        continue
                    ended.add(command.name)
                    print(f"{command.name}: {seconds:.0f} s", flush=True)
                    if finished:
                        finished(command, seconds)
                if asked or (limit and time.monotonic() - began_all > limit):
                    raise SystemExit(128 + (asked[0] if asked else signal.SIGTERM))
                given = commands() if callable(commands) else commands
                ready, left = _ready(given, ended, set(failed))
                for command in ready:
                    at_work = [other for other, _, _ in running.values()]
                    names = {other.name for other in at_work}
                    free = [place for place in range(places) if place not in running]
                    exclusive = command.alone or any(other.alone for other in at_work)
                    if not command.words or command.name in names or not free or (exclusive and running):
                        continue
                    place, at_once = _emptiest(free, running), 1 if command.alone else min(places, left)
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
        raise UserError(f"failed: {', '.join(failed)}; see {', '.join(map(str, failed.values()))}")


def _why_failed(command: Command, status: int) -> str | None:
    if status:
        return f"failed with status {status}"
    return "ended without its result" if command.done and not command.done() else None


def _ready(commands: Sequence[Command], ended: set[str], failed: set[str]) -> tuple[list[Command], int]:
    """Commands that are neither done nor failed, and whose needs are met; how many have not been run yet."""
    over = {command.name for command in commands if command.name in ended or (command.done and command.done())}
    blocked = set(failed)
    for command in commands:
        if blocked & set(command.needs) and not command.alone:
            blocked.add(command.name)
    left = [command for command in commands if command.name not in over | failed]
    ready = [command for command in left if not set(command.needs) - over - (blocked if command.alone else set())]
    return ready, sum(bool(command.words) for command in left if command.name not in blocked)


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
            command.words, cwd=command.folder, stdout=log, stderr=log, env=environment, start_new_session=True
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
