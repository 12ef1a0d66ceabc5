"""Statistics and features of the reference: stored, cached by content, or computed."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.evaluation.collect import AnyExtractor, Wanted, collect, conventions, read_batches
from vgen.evaluation.pictures import Pictures
from vgen.evaluation.settings import EvaluationSettings
from vgen.evaluation.sources import Reference
from vgen.evaluation.statistics import SetStatistics, StatisticsCache
from vgen.processes import Processes


@dataclass(frozen=True)
class RealSide:
    """What the scores need of the reference; complete on process 0.

    Attributes:
        statistics: fits, None if no distance is asked for.
        features: float32 [m, d], None if no metric needs them.
        size: (height, width), None where no picture was looked at.
        origin: ``stored``, ``cached`` or ``computed`` statistics.
    """

    statistics: SetStatistics | None = None
    features: Tensor | None = None
    size: tuple[int, int] | None = None
    origin: str | None = None


def batch_size(settings: EvaluationSettings, pictures: Pictures) -> int:
    """Items per forward pass."""
    return settings.batch_size if pictures.frames is None else settings.clip_batch_size


def measure_reference(
    reference: Reference,
    wanted: Wanted,
    *,
    extractor: AnyExtractor,
    processes: Processes,
    size: int,
    cache: str | None,
    warnings: list[str],
) -> RealSide:
    """Bring together what ``wanted`` names; every process must call this.

    Statistics of a file are used as they are. Others are looked up in the cache by the content of the reference and the
    conventions of the extractor, and stored there when they had to be computed.

    Args:
        reference: the real side.
        wanted: ``gaussian``, ``spatial``, ``features``.
        extractor: of the samples too.
        processes: that share the reference.
        size: items per forward pass of a process.
        cache: folder of computed statistics, None for none.
        warnings: added to.

    Raises:
        UserError: if features are wanted but the reference holds statistics only.
    """
    statistics, origin = reference.statistics, "stored"
    if statistics is not None and not statistics.meta and processes.rank == 0:
        warnings.append(f"{reference.name} does not say how its statistics were made; the extractor's way is assumed")
    fits = wanted.gaussian or wanted.spatial
    if reference.pictures is None:
        if wanted.features:
            raise UserError(
                f"{reference.name} holds statistics only, but kid, prc and prdc need pictures; give a reference with "
                f"pictures or leave them out"
            )
        return RealSide(statistics, origin=origin)
    height, width = reference.pictures.read([0]).shape[-2:]
    resolution = (height, width)
    store, content = None, ""
    if fits and statistics is None and cache is not None:
        store = StatisticsCache(Path(cache).expanduser())
        statistics, content = _cached(store, reference.pictures, extractor, wanted, processes)
        origin = "cached"
    found = int(processes.sum(torch.tensor(int(statistics is not None))))
    compute = fits and not found
    if not compute and not wanted.features:
        return RealSide(statistics, size=resolution, origin=origin if fits else None)
    batches = read_batches(reference.pictures, batch_size=size, processes=processes, description="reference")
    collected = collect(
        batches,
        total=len(reference.pictures),
        wanted=Wanted(gaussian=compute, spatial=compute and wanted.spatial, features=wanted.features),
        extractor=extractor,
        processes=processes,
        name=reference.name,
    )
    if collected.remark:
        warnings.append(collected.remark)
    if compute:
        statistics, origin = collected.statistics, "computed"
        if store is not None and statistics is not None and processes.rank == 0:
            try:
                store.put(content, statistics)
            except (UserError, OSError) as error:  # the score is worth more than its shortcut
                warnings.append(str(error))
    return RealSide(statistics, collected.features, resolution, origin if fits else None)


def _cached(
    cache: StatisticsCache, pictures: Pictures, extractor: AnyExtractor, wanted: Wanted, processes: Processes
) -> tuple[SetStatistics | None, str]:
    """Statistics of an earlier job and the content hash, both on process 0; a failure to read stops all."""
    statistics, content = None, ""
    failure: Exception | None = None
    if processes.rank == 0:
        try:
            content = pictures.fingerprint()
            statistics = cache.get(content, conventions(extractor))
        except Exception as error:
            failure = error
    processes.agree(failure)
    if statistics is not None and wanted.spatial and statistics.spatial is None:
        statistics = None
    return statistics, content
