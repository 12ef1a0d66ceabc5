"""Writing finished samples beside the work on the next ones."""

from collections.abc import Callable
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundWriter(Generic[T]):
    """One thread that writes what it is given, in order; used as a context.

    Leaving the context waits until everything is written, also where the work beside it failed. An error of the writer
    is raised by the next :meth:`put` or on leaving; what was queued behind it is not written.

    Args:
        write: writes one item.
        waiting: items that may wait before :meth:`put` blocks, so that memory stays constant.
    """

    def __init__(self, write: Callable[[T], None], *, waiting: int = 2) -> None:
        self._write = write
        self._queue: Queue[T | None] = Queue(waiting)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._work, name="vgen-writer", daemon=True)

    def __enter__(self) -> "BackgroundWriter[T]":
        self._thread.start()
        return self

    def put(self, item: T) -> None:
        """Queue an item; blocks while too many wait.

        Raises:
            BaseException: what an earlier item failed with.
        """
        self._raise()
        self._queue.put(item)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._write(item)
                except BaseException as error:
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
