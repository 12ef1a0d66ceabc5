"""Statistics of a set as a file, so that later jobs need no pictures of it."""

from datetime import UTC, datetime
from pathlib import Path

from vgen.evaluation.collect import AnyExtractor, Wanted, collect, conventions, read_batches
from vgen.evaluation.pictures import Pictures
from vgen.evaluation.statistics import SetStatistics, save_statistics
from vgen.processes import Processes
from vgen.runtime import git_commit


def measure_statistics(
    pictures: Pictures, *, extractor: AnyExtractor, batch_size: int, processes: Processes, out: Path
) -> SetStatistics:
    """Fit the features of a set and write ``out``: ``mu``, ``sigma``, with Inception also ``mu_s``, ``sigma_s``.

    Args:
        pictures: pictures or clips.
        extractor: network.
        batch_size: items per forward pass of a process.
        processes: that share the set; all must call this.
        out: .npz file, written by process 0.

    Raises:
        UserError: if an item cannot be read or the file cannot be written.
    """
    spatial = getattr(extractor, "spatial_dim", None) is not None
    collected = collect(
        read_batches(pictures, batch_size=batch_size, processes=processes, description="statistics"),
        total=len(pictures),
        wanted=Wanted(gaussian=True, spatial=spatial),
        extractor=extractor,
        processes=processes,
        name=pictures.name,
    )
    fits = collected.statistics
    assert fits is not None
    made = {
        "set": pictures.name,
        "resolution": list(collected.size),
        "vgen_commit": git_commit(),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    statistics = SetStatistics(fits.pool, fits.spatial, {**conventions(extractor), **made})
    if processes.rank == 0:
        save_statistics(out, statistics)
    return statistics
