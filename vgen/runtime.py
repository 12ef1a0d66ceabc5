"""Facts about the process: device, rank, versions, progress on the screen."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from vgen.errors import UserError


def rank() -> int:
    """Index of this process among those started together (torchrun, SLURM or Lightning), 0 when alone."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", 0))))


def world_size() -> int:
    """Number of processes started together, 1 when alone."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))


def pick_device(name: str = "auto") -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:i`` into a device.

    Raises:
        UserError: if the device is not present on this machine.
    """
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name} is not a device name; use auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name} was asked for but no CUDA device is present; use device=auto or device=cpu")
    return device


def pick_dtype(name: str) -> torch.dtype:
    """Turn ``float32``, ``bfloat16`` or ``float16`` into a dtype.

    Raises:
        UserError: for any other name.
    """
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise UserError(f"dtype={name} is unknown; choose one of {', '.join(names)}")
    return names[name]


def pick_cache_dtype(name: str | None) -> torch.dtype | None:
    """Turn what ``cache_dtype`` may be into a dtype; null = that of the network.

    Raises:
        UserError: for anything but null and ``float8_e4m3fn``.
    """
    if name not in (None, "float8_e4m3fn"):
        raise UserError(f"cache_dtype={name} is unknown; choose float8_e4m3fn or null")
    return None if name is None else torch.float8_e4m3fn


def git_commit() -> str:
    """Commit of the running source tree with ``-dirty`` when it was changed, or ``unknown``."""
    folder = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of the libraries that decide results."""
    report = {"python": platform.python_version()}
    for name in ("vgen", "torch", "torchvision", "pytorch-lightning", "hydra-core", "torch-fidelity", "numpy", "av"):
        try:
            report[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            report[name] = "missing"
    return report


def writable_folder(path: str | Path, key: str) -> Path:
    """Make a folder and prove that files can be written there, before any work is done.

    Raises:
        UserError: naming the configuration key if the folder cannot be made or written.
    """
    folder = Path(path)
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{key}={folder} cannot be written ({error.strerror}); choose another folder") from error
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time through, so that ranks do not do the same work into the same files."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def progress_bar(description: str, *, total: int, unit: str) -> tqdm:
    """A bar with speed and ETA, to be advanced by ``update``; silent on ranks other than 0."""
    return tqdm(total=total, desc=description, unit=unit, disable=rank() != 0, file=sys.stderr, smoothing=0.1)


def track(items: Iterable, description: str, *, total: float | None = None, unit: str = "it") -> Iterator:
    """Iterate with a progress bar that shows speed and ETA on rank 0; silent on other ranks."""
    return iter(tqdm(items, desc=description, total=total, unit=unit, disable=rank() != 0, file=sys.stderr))
