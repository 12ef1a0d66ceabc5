import socket

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Statistics of one test are not found by another."""
    monkeypatch.setenv("VGEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def unused_ports():
    """Two free TCP ports: a rendezvous that has just been left cannot be joined again at once."""
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
        return [first.getsockname()[1], second.getsockname()[1]]
