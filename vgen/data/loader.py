"""Batches in a keyed random order that can stop anywhere and continue exactly there."""

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vgen.data.broken import BrokenImages
from vgen.data.source import Batch, Draws
from vgen.errors import UserError
from vgen.random import keyed_permutation


class Drawable(Protocol):
    """What a loader needs of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...

    def __getitems__(self, draws: Draws) -> Batch: ...


def _as_is(batch: Any) -> Any:
    return batch


class _Order:
    """The (index, draw) lists of the batches that one process yields, from any place on."""

    def __init__(
        self, *, length: int, batch_size: int, seed: int, shuffle: bool, rank: int, world_size: int, drop_last: bool
    ):
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        share = batch_size * world_size
        self.num_batches = length // share if drop_last else -(-length // share)
        self.start = (0, 0)
        self.count = self.num_batches
        self._cached: tuple[int, Tensor] | None = None

    def _share(self, epoch: int) -> Tensor:
        """Positions in the epoch's order that belong to this process, as int64 [m, 2] (index, draw)."""
        if self._cached is None or self._cached[0] != epoch:
            order = keyed_permutation(self.length, self.seed, epoch) if self.shuffle else torch.arange(self.length)
            mine = torch.arange(self.rank, self.length, self.world_size)
            self._cached = epoch, torch.stack([order[mine], epoch * self.length + mine], dim=1)
        return self._cached[1]

    def batch(self, epoch: int, number: int) -> list[tuple[int, int]]:
        """Batch ``number`` of an epoch.

        Without ``drop_last`` all processes yield the same number of batches (collectives inside a step would hang
        otherwise), so a process whose share ends one short leaves an item for the last batch.
        """
        share = self._share(epoch)

        def end(batch: int) -> int:
            wanted = (batch + 1) * self.batch_size
            return wanted if self.drop_last else min(wanted, len(share) - (self.num_batches - 1 - batch))

        rows = share[end(number - 1) if number else 0 : end(number)].tolist()
        return [(index, draw) for index, draw in rows]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, number = self.start
        for _ in range(self.count):
            yield self.batch(epoch, number)
            epoch, number = (epoch, number + 1) if number + 1 < self.num_batches else (epoch + 1, 0)


class ResumableLoader:
    """Finite epochs of batches with a two-number state.

    A shuffled loader is one endless stream of epochs cut into pieces: each ``iter`` serves ``len(self)`` batches from
    where the last one stopped, so a trainer that leaves an epoch early sees the remaining images next. After
    :meth:`load_state_dict` the first ``iter`` serves the rest of the interrupted epoch. A loader that does not shuffle
    starts at the first image each time.

    Attributes:
        broken: names of the broken images met so far.
    """

    def __init__(self, dataset: Drawable, order: _Order, *, num_workers: int):
        self.dataset = dataset
        self.broken = BrokenImages(getattr(dataset, "broken", ()))
        self._order = order
        self._epoch = 0
        self._batches = 0
        self._resumed = False
        self._num_workers = num_workers
        self._loader: DataLoader = DataLoader(
            cast(Dataset, dataset),
            batch_sampler=order,
            collate_fn=_as_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Its own generator, because the loader draws a worker seed that would otherwise advance the global one
            # and make a resumed run differ from an uninterrupted one.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return self._order.num_batches

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next batch belongs to."""
        return self._epoch + (self._batches >= len(self))

    @property
    def place(self) -> tuple[int, int]:
        """Epoch of the batch that was handed over last, and its number in it; the same however often a run stopped."""
        return self._epoch, self._batches - 1

    def __iter__(self) -> Iterator[Batch]:
        if self._batches >= len(self):
            self._epoch, self._batches = self._epoch + 1, 0
        elif not self._order.shuffle and not self._resumed:
            self._batches = 0
        return self._serve()

    def _serve(self) -> Iterator[Batch]:
        self._order.start = self._epoch, self._batches
        self._order.count = len(self) - (self._batches if self._resumed or not self._order.shuffle else 0)
        self._resumed = False
        try:
            for batch in self._loader:
                if self._batches >= len(self):
                    self._epoch, self._batches = self._epoch + 1, 0
                # Counted before the batch is handed over: a state taken while it is used must not serve it again.
                self._batches += 1
                self.broken.add(batch.pop("broken", ()))
                yield batch
        except UserError as error:
            # A worker process wraps the message into its traceback; the user needs the last line only.
            raise UserError(str(error).strip().rsplit("UserError: ", 1)[-1]) from error

    def state_dict(self) -> dict[str, int]:
        """Place in the stream; the same on all processes."""
        order = self._order
        return {
            "epoch": self._epoch,
            "samples": self._batches * order.batch_size * order.world_size,
            "length": order.length,
            "seed": order.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a place saved by :meth:`state_dict`.

        A state written with another batch size or number of processes is continued at the batch that holds the next
        image.

        Raises:
            UserError: if the data set or the seed is another one.
        """
        order = self._order
        if state["length"] != order.length:
            raise UserError(
                f"the checkpoint was trained on {state['length']} images but the data set has {order.length}; "
                "resume with the same data"
            )
        if state["seed"] != order.seed:
            raise UserError(
                f"the checkpoint was trained with data order seed {state['seed']}, not {order.seed}; "
                "resume with the same seed"
            )
        self._epoch = state["epoch"]
        self._batches = state["samples"] // (order.batch_size * order.world_size)
        if state["samples"] >= order.length:
            self._batches = len(self)
        self._resumed = True


def build_loader(
    dataset: Drawable,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    drop_last: bool,
) -> ResumableLoader:
    """Build the loader of one process.

    Global batch k holds positions k * batch_size * world_size and on of the epoch's order; process r takes every
    world_size-th of them, so the images of a global batch depend on its size alone.

    Args:
        dataset: data set with ``__getitems__``.
        batch_size: images per batch and process.
        seed: of the order.
        shuffle: new order each epoch, or the order of the data set.
        rank: of this process.
        world_size: number of processes.
        num_workers: extra processes that prepare batches; 0 is fastest for data in memory.
        drop_last: leave out the images that do not fill a last global batch.

    Raises:
        UserError: if no batch comes out, or the images cannot be shared without repetition.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if num_workers < 0:
        raise UserError(f"num_workers={num_workers} must not be negative")
    assert 0 <= rank < world_size
    order = _Order(
        length=len(dataset),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        rank=rank,
        world_size=world_size,
        drop_last=drop_last,
    )
    if order.num_batches == 0:
        raise UserError(
            f"the data set has {len(dataset)} images, fewer than one batch of {batch_size} on {world_size} "
            "process(es); lower batch_size"
        )
    if not drop_last and len(dataset) // world_size < order.num_batches:
        raise UserError(
            f"{len(dataset)} images in batches of {batch_size} cannot be shared evenly by {world_size} processes; "
            "raise batch_size or use fewer processes"
        )
    return ResumableLoader(dataset, order, num_workers=num_workers)
