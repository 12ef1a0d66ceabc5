import threading

import pytest

from vgen.evaluation.prefetch import ahead


def test_same_items_in_the_same_order():
    assert list(ahead(range(20))) == list(range(20))
    assert list(ahead(())) == []


def test_reads_while_the_consumer_works_but_not_too_far():
    read, go = [], threading.Event()

    def items():
        for i in range(10):
            read.append(i)
            if i == 2:
                go.set()
            yield i

    taken = ahead(items(), depth=2)
    assert next(taken) == 0
    assert go.wait(10)  # two more were read without being asked for
    assert max(read) <= 4
    assert list(taken) == list(range(1, 10))


def test_errors_arrive_in_their_place():
    def items():
        yield 1
        raise ValueError("broken file")

    taken = ahead(items())
    assert next(taken) == 1
    with pytest.raises(ValueError, match="broken file"):
        next(taken)


def test_leaving_early_ends_the_thread():
    before = threading.active_count()
    taken = ahead(iter(range(1000)))
    next(taken)
    taken.close()
    assert threading.active_count() == before
