"""Random numbers of a decoding, by PyTorch and by their kernel: in Triton's interpreter, and on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from tests.paths import ROOT
from vgen.random import keyed_uniform
from vgen.sampling.noise import KeyedNoise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by the test of the interpreter")


def same_numbers(device, batch, count, own):
    torch.manual_seed(count)
    seed = torch.tensor(2**41 + 77, device=device)
    sample = torch.randint(2**50, (batch,), device=device)
    order = torch.stack([torch.randperm(count) for _ in range(batch)]) if own else torch.randperm(count)
    order = order.to(device)
    noise = KeyedNoise(seed, sample, order)
    assert torch.equal(noise.first[:, :count], keyed_uniform(seed, sample[:, None], order))
    assert (noise.first[:, count:] == 0).all()
    assert noise.first.shape == (batch, count + 1)
    return noise


CASES = [(3, 7, False), (2, 127, True), (1, 128, False), (2, 300, True)]


@pytest.mark.parametrize(("batch", "count", "own"), CASES)
def test_numbers_of_the_first_draw_are_keyed_by_seed_sample_and_place(batch, count, own):
    noise = same_numbers("cpu", batch, count, own)
    zero = torch.zeros(batch, 1, dtype=torch.int64)
    assert not torch.equal(noise.uniform(zero, zero, 1), noise.first[:, :1])


def test_the_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("this is it")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "5 passed" in run.stdout, run.stdout


@interpreted
def test_it_is_the_kernel_that_is_interpreted(monkeypatch):
    monkeypatch.setattr("vgen.sampling.noise.keyed_uniform", None)
    assert KeyedNoise(torch.tensor(3), torch.arange(2), torch.arange(5)).first.shape == (2, 6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("batch", "count", "own"), [*CASES, (512, 2304, False)])
def test_on_a_gpu(batch, count, own):
    same_numbers("cuda", batch, count, own)
