"""Two CPU processes over gloo do what one process does with the doubled batch."""

import pytest
import torch
from safetensors.torch import load_file

from tests.training.helpers import TOKENIZER, column, launch, run, two_processes
from vgen.training.run import Result


def assert_equal_runs(two: Result, one: Result, names: list[str]) -> None:
    for name in names:
        assert column(two, name) == pytest.approx(column(one, name), rel=2e-3, abs=1e-5), name
    weights, expected = (load_file(result.release / "model.safetensors") for result in (two, one))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.slow
def test_tokenizer_with_discriminator(tmp_path):
    # The 41 validation images leave the two processes with batches of different sizes.
    settings = [
        *TOKENIZER,
        "task.loss.adversarial_weight=0.5",
        "task.loss.adversarial_start=3",
        "task.discriminator.num_layers=1",
        "task.discriminator.base_channels=4",
        "task.discriminator.norm=group",
        "task.accumulate=2",
        "task.optimizer.lr=1e-4",
        # Biases before a normalisation have no gradient but rounding, which Adam would blow up.
        "+task.optimizer.eps=1e-3",
        "task.ema.decay=0.9",
        "every.validate=2",
        "every.pictures=2",
        "trainer.max_steps=5",
    ]
    two = launch(tmp_path / "two", *settings, *two_processes(32), torchrun=False)
    one = run(tmp_path / "one", *settings, "task.batch_size=16", "task.global_batch=32")
    names = ["loss", "grad_norm", "discriminator", "codebook_usage"]
    assert_equal_runs(two, one, [*(f"train/{name}" for name in names), "val/loss", "val/perplexity"])


@pytest.mark.slow
def test_generator_from_cached_codes(scored_by_two, tmp_path):
    settings, two = scored_by_two
    one = run(tmp_path / "one" / "run", *settings, "task.batch_size=16", "task.global_batch=16")
    assert_equal_runs(two, one, ["train/loss", "train/grad_norm", "train/accuracy", "val/loss"])
