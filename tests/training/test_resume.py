from pathlib import Path

import pytest
import torch

from tests.training.helpers import GENERATOR, TOKENIZER, column, composed, load, run, same
from vgen.training.checkpointing import AtomicCheckpointIO
from vgen.training.parts import build_parts
from vgen.training.settings import resolve

ADVERSARIAL = [
    "task.loss.adversarial_weight=0.5",
    "task.loss.adversarial_start=6",
    "task.discriminator.num_layers=1",
    "task.discriminator.base_channels=4",
    "tokenizer.dropout=0.1",
]
SHARED = ["task.ema.decay=0.9", "task.lr_schedule.shape=cosine", "task.lr_schedule.warmup=3"]
SHARED += ["task.lr_schedule.total=12"]


def overrides(kind, tokenizer_release) -> list[str]:
    if kind == "tokenizer":
        return [*TOKENIZER, *ADVERSARIAL, *SHARED]
    return [*GENERATOR, *SHARED, f"task.tokenizer={tokenizer_release}"]


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_resume_continues_exactly(kind, tokenizer_release, tmp_path):
    # 180 images in batches of 24 are 7 per epoch; 8 steps of 2 batches stop inside the third epoch.
    settings = [*overrides(kind, tokenizer_release), "task.batch_size=24", "task.accumulate=2"]
    settings += ["every.validate=4", "every.checkpoint=5"]
    whole = run(tmp_path / "whole", *settings, "trainer.max_steps=12")
    part = run(tmp_path / "part", *settings, "trainer.max_steps=8")
    assert column(part, "train/loss") == column(whole, "train/loss")[:8]
    resumed = run(tmp_path / "part", *settings, "trainer.max_steps=12")
    for name in ("train/loss", "train/grad_norm", "train/lr", "val/loss"):
        assert column(resumed, name) == column(whole, name), name
    ends = [load(result.checkpoints / "last.ckpt") for result in (whole, resumed)]
    for name in ("state_dict", "ema", "optimizer_states"):
        assert same(ends[0][name], ends[1][name]), name
    assert len(column(whole, "train/loss")) == ends[0]["global_step"] == 12


@pytest.mark.parametrize(
    ("accumulate", "every"),
    [
        *((1, every) for every in ("", "validate=1", "validate=2", "checkpoint=2", "validate=2 checkpoint=2")),
        *((2, every) for every in ("", "validate=2 checkpoint=2")),
    ],
)
def test_stops_inside_an_epoch_change_nothing_that_is_keyed_by_it(accumulate, every, tokenizer_release, tmp_path):
    # 180 images in batches of 36 are 5 per epoch. Hidden tokens, dropped conditions and dropout are new in each epoch.
    settings = [*overrides("generator", tokenizer_release), *(f"every.{word}" for word in every.split())]
    settings += ["task.batch_size=36", "generator=maskgit_digits", "schedule=masked", "schedule.steps=3"]
    settings += ["task.condition_dropout=0.5", "generator.residual_dropout=0.1", f"task.accumulate={accumulate}"]
    whole = run(tmp_path / "whole", *settings, "trainer.max_steps=9")
    for steps in (2, 3, 4, 6, 9):
        part = run(tmp_path / "part", *settings, f"trainer.max_steps={steps}")
        assert column(part, "train/loss") == column(whole, "train/loss")[:steps], steps
    ends = [load(result.checkpoints / "last.ckpt") for result in (whole, part)]
    for name in ("epoch", "state_dict", "ema", "optimizer_states"):
        assert same(ends[0][name], ends[1][name]), name


def test_the_checkpoint_of_a_finished_run_is_written_once(tokenizer_release, tmp_path, monkeypatch):
    written = []
    save = AtomicCheckpointIO.save_checkpoint

    def watched(self, checkpoint, path, storage_options=None):
        written.append(Path(path).name)
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", watched)
    run(tmp_path / "run", *overrides("generator", tokenizer_release), "trainer.max_steps=2")
    assert written == ["last.ckpt"]


def test_checkpoint_holds_plain_containers(tokenizer_release, tmp_path):
    result = run(tmp_path / "run", *overrides("generator", tokenizer_release), "trainer.max_steps=2")
    checkpoint = load(result.checkpoints / "last.ckpt")
    assert checkpoint["hyper_parameters"]["config"]["generator"]["dim"] == 16
    assert type(checkpoint["hyper_parameters"]["config"]["task"]["optimizer"]["betas"]) is list
    # The frozen tokenizer is not part of the state.
    assert all(name.startswith("network.") for name in checkpoint["state_dict"])
    assert not any("decoder" in name for name in checkpoint["state_dict"])


def test_resume_from_a_path_starts_another_run(tokenizer_release, tmp_path):
    settings = overrides("generator", tokenizer_release)
    first = run(tmp_path / "first", *settings, "trainer.max_steps=3")
    path = first.checkpoints / "last.ckpt"
    second = run(tmp_path / "second", *settings, "trainer.max_steps=4", f"resume={path}")
    assert len(column(second, "train/loss")) == 1
    assert load(second.checkpoints / "last.ckpt")["global_step"] == 4
    assert load(path)["global_step"] == 3


def test_label_dropout_depends_on_seed_epoch_and_image_only(tokenizer_release, tmp_path):
    settings = [*overrides("generator", tokenizer_release), f"run_dir={tmp_path}", "task.condition_dropout=0.3"]
    module = build_parts(resolve(composed(*settings))).module
    index = torch.arange(2000)
    dropped = module.dropped(index)
    assert torch.equal(dropped[1::2], module.dropped(index[1::2]))
    assert 0.25 < dropped.float().mean() < 0.35
