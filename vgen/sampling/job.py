"""What sample.py runs: a whole sampling job from configuration to files."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.media import contact_sheet, require_av, save_gif, save_mp4, tiled
from vgen.pixels import save_grid
from vgen.runtime import git_commit, versions, writable_folder
from vgen.sampling.animation import animate
from vgen.sampling.pipeline import Pipeline, sample_stream
from vgen.sampling.settings import Sampling
from vgen.sampling.store import SampleStore, formats_of, grid_order
from vgen.sampling.writer import BackgroundWriter

ANIMATION = "decode.gif"
_MOST_STRIPS = 20  # clips on a contact sheet
_CELL = 64  # pixels; smaller samples are magnified on the grid


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
    fmt: str | Sequence[str],
    grid_pictures: int,
    animated: int = 0,
    fps: float = 8.0,
    split_batches: bool = False,
) -> list[Path]:
    """Sample, store and draw a grid; of clips a contact sheet ``grid.png`` and ``grid.gif``, ``grid.mp4`` in motion.

    Args:
        pipeline: what to sample from.
        sampling: settings.
        peers: the processes that share the work.
        identity: what the samples depend on besides the arguments here (checkpoint hash, schedule, dtype).
        out: output folder.
        num_samples: number of samples.
        labels: see :meth:`vgen.sampling.pipeline.Pipeline.labels`.
        batch_size: samples per batch and process.
        fmt: see :func:`vgen.sampling.store.formats_of`.
        grid_pictures: pictures on the grid; 0 = none.
        animated: samples whose decoding is shown in ``decode.gif``; 0 = none.
        fps: frames per second of clips in viewable files, at most 50.
        split_batches: halve batches that do not fit in memory.

    Returns:
        The files written.

    Raises:
        UserError: for bad arguments before any work.
    """
    if num_samples < 1 or batch_size < 1 or grid_pictures < 0:
        raise UserError("num_samples and batch_size must be at least 1, grid_pictures at least 0")
    if not 0 <= animated <= 64:
        raise UserError(f"animate={animated} must lie in 0..64: the number of samples shown in decode.gif")
    clips = pipeline.num_frames is not None
    if clips and not 0 < fps <= 50:
        raise UserError(f"fps={fps} must lie in (0, 50] frames per second")
    if clips and ("mp4" in formats_of(fmt, clips=True) or grid_pictures):
        require_av()
    folder = writable_folder(out, "out")
    wanted = pipeline.labels(labels, num_samples, seed=sampling.seed)
    store_arguments: dict[str, Any] = {
        "labels": wanted,
        "sample_shape": pipeline.sample_shape,
        "identity": {**identity, "num_samples": num_samples, "format": fmt},
        "fmt": fmt,
        "fps": fps,
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
        stream = sample_stream(
            pipeline, wanted, sampling, batch_size=batch_size, done=store.done, split_batches=split_batches
        )
        with BackgroundWriter(store.write) as writer:
            for batch in stream:
                writer.put(batch)
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
        samples = store.pictures(index)
        scale = max(1, _CELL // samples.shape[-1])
        path = store.folder / "grid.png"
        if samples.dim() == 4:
            save_grid(samples, path, columns=columns, scale=scale)
        else:
            _show_clips(samples, path, columns=columns, scale=scale, fps=store.fps)
    store.finish({"vgen_commit": git_commit(), "versions": versions(), **facts})


def _show_clips(clips: Tensor, path: Path, *, columns: int, scale: int, fps: float) -> None:
    """Clips uint8 [n, 3, T, H, W] as a contact sheet, the first of every column first, and side by side in motion."""
    contact_sheet(clips[:_MOST_STRIPS], path, scale=scale)
    large = clips.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    moving = tiled(large, columns=columns)
    save_gif(moving, path.with_suffix(".gif"), fps=fps)
    save_mp4(moving, path.with_suffix(".mp4"), fps=fps)
