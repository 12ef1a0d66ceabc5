"""What every test shares: one thread, the same random numbers, and the commands run in this process."""

import os

# Networks here are so small that a second thread only waits; the processes that tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import runpy
import sys
from functools import partial

import pytest
import torch

from tests.interpreter import list_language_once
from tests.paths import ROOT

if os.environ.get("TRITON_INTERPRET") == "1":
    list_language_once()


@pytest.fixture(autouse=True)
def _same_numbers():
    """Numbers that a test draws do not hang on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def traced_only(monkeypatch):
    """torch.compile traces networks and their gradients and generates no code, which takes most of a minute.

    That compiled code computes the same is tested in tests/training/test_steps.py.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a script of the root here and now: (name, *arguments) to exit status, standard output, standard error."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        status = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
