"""Sharded training does what one process does; needs two GPUs."""

import pytest
import torch

from tests.training.helpers import GENERATOR, NO_DROPOUT, launch
from tests.training.test_ddp import assert_equal_runs

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.slow
def test_sharded_equals_single(tokenizer_release, tmp_path):
    settings = [
        *GENERATOR,
        *NO_DROPOUT,
        f"task.tokenizer={tokenizer_release}",
        "task.optimizer.lr=1e-4",
        "every.validate=2",
        "every.checkpoint=2",
        "task.global_batch=16",
    ]
    sharded = ["trainer=fsdp", "trainer.precision=32-true", "trainer.devices=2", "task.batch_size=8"]
    single = ["trainer=gpu", "trainer.precision=32-true", "task.batch_size=16"]
    launch(tmp_path / "two", *settings, *sharded, "trainer.max_steps=3", torchrun=False)
    two = launch(tmp_path / "two", *settings, *sharded, "trainer.max_steps=6", torchrun=False)
    one = launch(tmp_path / "one", *settings, *single, "trainer.max_steps=6", torchrun=False)
    assert_equal_runs(two, one, ["train/loss", "train/grad_norm", "val/loss"])
