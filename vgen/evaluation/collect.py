"""One pass over a set, sharded over processes: statistics, features, logits, pixels."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.evaluation.clip_features import ClipExtractor
from vgen.evaluation.features import Extractor, Features
from vgen.evaluation.frechet import FeatureStatistics, Gaussian
from vgen.evaluation.pictures import Pictures, RangeGuard
from vgen.evaluation.prefetch import ahead
from vgen.evaluation.rows import Rows
from vgen.evaluation.statistics import SetStatistics
from vgen.processes import Processes
from vgen.runtime import progress_bar

AnyExtractor = Extractor | ClipExtractor


@dataclass(frozen=True)
class PictureBatch:
    """Items with their labels int64 [B] (or None) and their index int64 [B] in the whole set.

    Items are pictures uint8 [B, 3, H, W] or clips uint8 [B, T, 3, H, W].
    """

    pictures: Tensor
    labels: Tensor | None
    index: Tensor


@dataclass(frozen=True)
class Wanted:
    """What a pass must bring back for the metrics asked for."""

    gaussian: bool = False
    spatial: bool = False
    features: bool = False
    logits: bool = False
    pictures: bool = False

    @property
    def extractor(self) -> bool:
        """Whether the extractor must run."""
        return self.gaussian or self.spatial or self.features or self.logits


@dataclass(frozen=True)
class Collected:
    """Result of a pass; tensors are in index order and complete on process 0 only.

    Attributes:
        count: items seen by all processes.
        size: (height, width).
        remark: what looks odd about the pixels, on every process.
        labels: int64 [n] or None.
        statistics: fits of the features, on every process.
        features: float32 [n, d].
        logits: float32 [n, classes].
        pictures: uint8 [n, 3, H, W].
    """

    count: int
    size: tuple[int, int]
    remark: str | None = None
    labels: Tensor | None = None
    statistics: SetStatistics | None = None
    features: Tensor | None = None
    logits: Tensor | None = None
    pictures: Tensor | None = None

    @property
    def gaussian(self) -> Gaussian | None:
        """Fit of the pooled features."""
        return None if self.statistics is None else self.statistics.pool


def read_batches(
    pictures: Pictures, *, batch_size: int, processes: Processes, description: str
) -> Iterator[PictureBatch]:
    """Read this process's share of a set batch by batch, ahead of the consumer, with a progress bar."""
    share = list(processes.share(len(pictures)))
    unit = "img" if pictures.frames is None else "clip"

    def read() -> Iterator[PictureBatch]:
        for start in range(0, len(share), batch_size):
            index = share[start : start + batch_size]
            labels = None if pictures.labels is None else pictures.labels[torch.tensor(index)]
            items = pictures.read(index)
            if torch.cuda.is_initialized():  # a copy from pinned memory does not stop the device
                items = items.pin_memory()
            yield PictureBatch(items, labels, torch.tensor(index))

    with progress_bar(description, total=len(share), unit=unit) as bar:
        for batch in ahead(read()):
            yield batch
            bar.update(len(batch.index))


def extract(extractor: AnyExtractor, items: Tensor) -> Features:
    """Features of pictures uint8 [B, 3, H, W] or clips uint8 [B, T, 3, H, W].

    Raises:
        UserError: if the extractor is made for the other kind.
    """
    for_clips = isinstance(extractor, ClipExtractor)
    if for_clips != (items.ndim == 5):
        kinds = ("clips", "pictures") if for_clips else ("pictures", "clips")
        raise UserError(f"extractor {extractor.name} takes {kinds[0]}, but {kinds[1]} are scored")
    if isinstance(extractor, ClipExtractor):
        return Features(extractor(items.transpose(1, 2)), None, None)
    return extractor.extract(items)


def divisor(extractor: AnyExtractor) -> int:
    """The covariance of an extractor's scores is divided by n minus this."""
    return extractor.variant.ddof if isinstance(extractor, ClipExtractor) else 1


class Fits:
    """Fits of the pooled and spatial features of a set seen batch by batch, with the samples where they are few.

    Args:
        extractor: that made the features.
        total: items of the whole set.
        spatial: fit the spatial features too.
    """

    def __init__(self, extractor: AnyExtractor, total: int, *, spatial: bool):
        self.extractor = extractor
        widths = {"pool": extractor.dim}
        if spatial:
            assert isinstance(extractor, Extractor)
            assert extractor.spatial_dim is not None
            widths["spatial"] = extractor.spatial_dim
        self.states = {key: FeatureStatistics(width, extractor.device) for key, width in widths.items()}
        self.rows: dict[str, list[Tensor]] = {key: [] for key, width in widths.items() if total <= width}

    def update(self, features: Features) -> None:
        """Add the features of a batch."""
        for key, state in self.states.items():
            values = getattr(features, key)
            state.update(values)
            if key in self.rows:
                self.rows[key].append(values.cpu())

    def finish(self, index: Tensor, processes: Processes) -> SetStatistics:
        """The fits of all processes together, on every one of them; the samples' own root on process 0 only.

        Args:
            index: int64 [n], index of every item this process has added.
            processes: all of them must call this.
        """
        fits = {}
        for key, state in self.states.items():
            rows = processes.gather(index, torch.cat(self.rows[key])) if key in self.rows else None
            state.reduce(processes)
            fits[key] = state.gaussian(rows if processes.rank == 0 else None, ddof=divisor(self.extractor))
        return SetStatistics(fits["pool"], fits.get("spatial"), conventions(self.extractor))


def conventions(extractor: AnyExtractor) -> dict:
    """What two sets must share for a distance between them to mean anything."""
    return {**extractor.conventions(), "ddof": divisor(extractor)}


def collect(
    batches: Iterable[PictureBatch],
    *,
    total: int,
    wanted: Wanted,
    extractor: AnyExtractor | None,
    processes: Processes,
    name: str = "the set",
) -> Collected:
    """Run the extractor over a set and bring together what the metrics need.

    Args:
        batches: this process's share of the set.
        total: items of the whole set, over all processes.
        wanted: what to keep.
        extractor: needed if ``wanted.extractor``.
        processes: the processes that share the set; at most one per item.
        name: of the set, for messages.

    Raises:
        UserError: if the number of items differs from ``total``, there are fewer items than processes, or they were
            stored as 8 bits without scaling. A failure in one process is raised in all of them.
    """
    if total < processes.world_size:
        raise UserError(f"{total} pictures cannot be shared by {processes.world_size} processes; start fewer")
    if wanted.extractor:
        assert extractor is not None
    run = extractor if wanted.extractor else None
    fits = Fits(run, total, spatial=wanted.spatial) if run and (wanted.gaussian or wanted.spatial) else None
    share = len(processes.share(total))
    kept = {key: Rows(share) for key in ("index", "labels", "features", "logits", "pictures")}
    size = (0, 0)
    guard = RangeGuard()
    failure: Exception | None = None
    try:
        for batch in batches:
            size = (batch.pictures.shape[-2], batch.pictures.shape[-1])
            guard.update(batch.pictures)
            kept["index"].add(batch.index.cpu())
            if batch.labels is not None:
                kept["labels"].add(batch.labels.cpu())
            if wanted.pictures:
                kept["pictures"].add(batch.pictures.cpu())
            if run is not None:
                features = extract(run, batch.pictures)
                if fits is not None:
                    fits.update(features)
                if wanted.features:
                    kept["features"].add(features.pool.cpu())
                if wanted.logits and features.logits is not None:
                    kept["logits"].add(features.logits.cpu())
    except Exception as error:  # told to the other processes before it goes on, or they would wait for ever
        failure = error
    processes.agree(failure)
    index = kept.pop("index").tensor()
    assert index is not None
    count, binary = processes.sum(torch.tensor([len(index), guard.binary])).tolist()
    if count != total:
        raise UserError(f"{count} pictures were scored but {total} were asked for; the set changed while it was read")
    remark = RangeGuard.check(count, binary, name)
    gathered: dict[str, Tensor | None] = {}
    for key, rows in kept.items():
        values = rows.tensor()
        gathered[key] = None if values is None else processes.gather(index, values)
    return Collected(
        count=count,
        size=size,
        remark=remark,
        labels=gathered["labels"],
        statistics=fits.finish(index, processes) if fits is not None else None,
        features=gathered["features"],
        logits=gathered["logits"],
        pictures=gathered["pictures"],
    )
