import threading

import pytest

from vgen.sampling.writer import BackgroundWriter


def test_writes_in_order_beside_the_caller_and_finishes_before_leaving():
    written, gate = [], threading.Event()

    def write(item):
        gate.wait(10)
        written.append((item, threading.current_thread().name))

    with BackgroundWriter(write) as writer:
        writer.put(1)
        writer.put(2)
        assert written == []
        gate.set()
        writer.put(3)
    assert written == [(1, "vgen-writer"), (2, "vgen-writer"), (3, "vgen-writer")]


def test_an_error_of_the_writer_reaches_the_caller_and_later_items_are_not_written():
    written = []

    def write(item):
        if item == 2:
            raise OSError("full")
        written.append(item)

    def work():
        with BackgroundWriter(write) as writer:
            for item in range(1, 100):
                writer.put(item)

    with pytest.raises(OSError, match="full"):
        work()
    assert written == [1]


def test_what_was_finished_is_written_when_the_work_beside_it_fails():
    written = []

    def work():
        with BackgroundWriter(written.append) as writer:
            writer.put(1)
            raise RuntimeError("beside")

    with pytest.raises(RuntimeError, match="beside"):
        work()
    assert written == [1]
