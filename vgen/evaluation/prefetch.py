"""Reading ahead of the device: batches are read and decoded in a thread while the network works on the last one."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()


def ahead(batches: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """Yield the same items in the same order, at most ``depth`` of them read in advance.

    An error of the reader is raised where its item would have come. When the consumer stops early the thread ends after
    the item it is at.

    Args:
        batches: read in a thread of its own, so it must not use the device.
        depth: bounds the host memory, at ``depth`` + 2 items.
    """
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: object) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def read() -> None:
        try:
            for batch in batches:
                put((batch, None))
                if stopped.is_set():
                    return
            put(_END)
        except BaseException as error:  # handed to the consumer, whatever it is
            put((None, error))

    thread = threading.Thread(target=read, name="vgen-read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            batch, error = item
            if error is not None:
                raise error
            yield batch
    finally:
        stopped.set()
        thread.join()
