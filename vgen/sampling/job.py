"""What sample.py runs: a whole sampling job from configuration to files."""

import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.pixels import save_grid
from vgen.runtime import git_commit, versions, writable_folder
from vgen.sampling.animation import animate
from vgen.sampling.pipeline import Pipeline, make_labels, sample_stream
from vgen.sampling.settings import Sampling
from vgen.sampling.store import SampleStore, grid_order

ANIMATION = "decode.gif"


class Peers(Protocol):
    """The processes of one job."""

    rank: int
    world_size: int

    def barrier(self) -> None:
        """Wait for all processes."""


def run_sampling(
    pipeline: Pipeline,
    sampling: Sampling,
    *,
    peers: Peers,
    identity: dict[str, Any],
    out: str,
    num_samples: int,
    labels: str,
    batch_size: int,
    fmt: str,
    grid_pictures: int,
    animated: int = 0,
) -> list[Path]:
    """Sample, store and draw a grid.

    Args:
        pipeline: what to sample from.
        sampling: settings.
        peers: the processes that share the work.
        identity: what the samples depend on besides the arguments here (checkpoint hash, schedule, dtype).
        out: output folder.
        num_samples: number of samples.
        labels: see :func:`vgen.sampling.pipeline.make_labels`.
        batch_size: samples per batch and process.
        fmt: see :class:`vgen.sampling.store.SampleStore`.
        grid_pictures: pictures on the grid; 0 = none.
        animated: samples whose decoding is shown in ``decode.gif``; 0 = none.

    Returns:
        The files written.

    Raises:
        UserError: for bad arguments before any work.
    """
    if num_samples < 1 or batch_size < 1 or grid_pictures < 0:
        raise UserError("num_samples and batch_size must be at least 1, grid_pictures at least 0")
    if not 0 <= animated <= 64:
        raise UserError(f"animate={animated} must lie in 0..64: the number of samples shown in decode.gif")
    folder = writable_folder(out, "out")
    wanted = make_labels(labels, num_samples, pipeline.num_classes, seed=sampling.seed)
    size = pipeline.picture_size
    store_arguments: dict[str, Any] = {
        "labels": wanted,
        "image_shape": (size, size),
        "identity": {**identity, "num_samples": num_samples, "format": fmt},
        "fmt": fmt,
    }
    store = SampleStore(folder, create=True, **store_arguments) if peers.rank == 0 else None
    peers.barrier()
    store = store or SampleStore(folder, create=False, **store_arguments)
    if animated and peers.rank == 0 and not (folder / ANIMATION).is_file():
        shown = torch.arange(min(animated, num_samples))
        animate(pipeline, wanted[shown], shown, sampling, folder / ANIMATION)
    if not store.finished:
        before = int(store.done.sum())
        start = time.perf_counter()
        for batch in sample_stream(pipeline, wanted, sampling, batch_size=batch_size, done=store.done):
            store.write(batch)
        peers.barrier()
        if peers.rank == 0:
            seconds = time.perf_counter() - start
            rate = (num_samples - before) / seconds if num_samples > before else None
            _finish(store, wanted, pipeline.num_classes, grid_pictures, images_per_s=rate, world_size=peers.world_size)
        peers.barrier()
    return [path for path in sorted(folder.iterdir()) if path.name != "partial"]


def _finish(store: SampleStore, labels: Tensor, num_classes: int, grid_pictures: int, **facts: Any) -> None:
    if grid_pictures:
        index, columns = grid_order(labels, num_classes, grid_pictures)
        pictures = store.pictures(index)
        scale = max(1, 64 // pictures.shape[-1])
        save_grid(pictures, store.folder / "grid.png", columns=columns, scale=scale)
    store.finish({"vgen_commit": git_commit(), "versions": versions(), **facts})
