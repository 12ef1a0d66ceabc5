"""One pass over a picture set, sharded over processes: statistics, features, logits, pixels."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.evaluation.features import Extractor
from vgen.evaluation.frechet import FeatureStatistics, Gaussian
from vgen.evaluation.pictures import Pictures, RangeGuard
from vgen.processes import Processes
from vgen.runtime import progress_bar


@dataclass(frozen=True)
class PictureBatch:
    """Pictures uint8 [B, 3, H, W], their labels int64 [B] (or None) and their index int64 [B] in the whole set."""

    pictures: Tensor
    labels: Tensor | None
    index: Tensor


@dataclass(frozen=True)
class Wanted:
    """What a pass must bring back for the metrics asked for."""

    gaussian: bool = False
    features: bool = False
    logits: bool = False
    pictures: bool = False

    @property
    def extractor(self) -> bool:
        """Whether the extractor must run."""
        return self.gaussian or self.features or self.logits


@dataclass(frozen=True)
class Collected:
    """Result of a pass; tensors are in index order and complete on process 0 only.

    Attributes:
        count: pictures seen by all processes.
        size: (height, width).
        labels: int64 [n] or None.
        gaussian: fit of the features, on every process.
        features: float32 [n, d].
        logits: float32 [n, classes].
        pictures: uint8 [n, 3, H, W].
        remark: what looks odd about the pixels, on every process.
    """

    count: int
    size: tuple[int, int]
    remark: str | None = None
    labels: Tensor | None = None
    gaussian: Gaussian | None = None
    features: Tensor | None = None
    logits: Tensor | None = None
    pictures: Tensor | None = None


def read_batches(
    pictures: Pictures, *, batch_size: int, processes: Processes, description: str
) -> Iterator[PictureBatch]:
    """Read this process's share of a set batch by batch, with a progress bar."""
    share = list(processes.share(len(pictures)))
    with progress_bar(description, total=len(share), unit="img") as bar:
        for start in range(0, len(share), batch_size):
            index = share[start : start + batch_size]
            labels = None if pictures.labels is None else pictures.labels[torch.tensor(index)]
            yield PictureBatch(pictures.read(index), labels, torch.tensor(index))
            bar.update(len(index))


def collect(
    batches: Iterable[PictureBatch],
    *,
    total: int,
    wanted: Wanted,
    extractor: Extractor | None,
    processes: Processes,
    name: str = "the set",
) -> Collected:
    """Run the extractor over a set and bring together what the metrics need.

    Args:
        batches: this process's share of the set.
        total: pictures of the whole set, over all processes.
        wanted: what to keep.
        extractor: needed if ``wanted.extractor``.
        processes: the processes that share the set; at most one per picture.
        name: of the set, for messages.

    Raises:
        UserError: if the number of pictures differs from ``total``, there are fewer pictures than processes, or they
            were stored as 8 bits without scaling. A failure in one process is raised in all of them.
    """
    if total < processes.world_size:
        raise UserError(f"{total} pictures cannot be shared by {processes.world_size} processes; start fewer")
    if wanted.extractor:
        assert extractor is not None
    run = extractor if wanted.extractor else None
    statistics = FeatureStatistics(run.dim, run.device) if run and wanted.gaussian else None
    keep_features = run is not None and (wanted.features or (wanted.gaussian and total <= run.dim))
    kept: dict[str, list[Tensor]] = {"index": [], "labels": [], "features": [], "logits": [], "pictures": []}
    size = (0, 0)
    guard = RangeGuard()
    failure: Exception | None = None
    try:
        for batch in batches:
            size = (batch.pictures.shape[-2], batch.pictures.shape[-1])
            guard.update(batch.pictures)
            kept["index"].append(batch.index.cpu())
            if batch.labels is not None:
                kept["labels"].append(batch.labels.cpu())
            if wanted.pictures:
                kept["pictures"].append(batch.pictures.cpu())
            if run is not None:
                features, logits = run(batch.pictures)
                if statistics is not None:
                    statistics.update(features)
                if keep_features:
                    kept["features"].append(features.cpu())
                if wanted.logits and logits is not None:
                    kept["logits"].append(logits.cpu())
    except Exception as error:  # told to the other processes before it goes on, or they would wait for ever
        failure = error
    processes.agree(failure)
    index = torch.cat(kept.pop("index"))
    count, binary = processes.sum(torch.tensor([len(index), guard.binary])).tolist()
    if count != total:
        raise UserError(f"{count} pictures were scored but {total} were asked for; the set changed while it was read")
    remark = RangeGuard.check(count, binary, name)
    gathered = {key: processes.gather(index, torch.cat(parts)) if parts else None for key, parts in kept.items()}
    gaussian = None
    if statistics is not None:
        statistics.reduce(processes)
        rows = gathered["features"] if processes.rank == 0 else None
        gaussian = statistics.gaussian(rows)
    return Collected(
        count=count,
        size=size,
        labels=gathered["labels"],
        gaussian=gaussian,
        features=gathered["features"] if wanted.features else None,
        logits=gathered["logits"],
        pictures=gathered["pictures"],
        remark=remark,
    )
