"""What counts as a step, what an interrupted or failing run leaves behind."""

import os
import shutil
import signal

import pytest
import torch

from tests.training.helpers import GENERATOR, TOKENIZER, column, load, run, same
from vgen.errors import UserError
from vgen.training.callbacks import InterruptedTrainingError, StepCallback
from vgen.training.checkpointing import AtomicCheckpointIO
from vgen.training.generator_module import GeneratorModule
from vgen.training.tokenizer_module import TokenizerModule

ADVERSARIAL = [
    *TOKENIZER,
    "task.loss.adversarial_weight=0.5",
    "task.discriminator.num_layers=1",
    "task.discriminator.base_channels=4",
]


def test_discriminator_steps_do_not_count_and_begin_on_time(tmp_path):
    result = run(tmp_path / "run", *ADVERSARIAL, "task.loss.adversarial_start=4", "trainer.max_steps=6")
    checkpoint = load(result.checkpoints / "last.ckpt")
    assert checkpoint["global_step"] == 6
    networks, discriminators = (list(state["state"].values()) for state in checkpoint["optimizer_states"])
    assert {int(state["step"]) for state in networks} == {6}
    assert {int(state["step"]) for state in discriminators} == {3}
    assert len(column(result, "train/discriminator")) == 3
    assert len(column(result, "train/loss")) == 6


def test_release_has_no_discriminator(tmp_path):
    from safetensors.torch import load_file

    settings = [*ADVERSARIAL, "task.loss.adversarial_start=0", "trainer.max_steps=1", "task.ema.decay=0.5"]
    result = run(tmp_path / "run", *settings)
    names = load_file(result.release / "model.safetensors").keys()
    assert names
    assert not any("discriminator" in name or "_orig_mod" in name or name.startswith("network.") for name in names)


@pytest.mark.slow
def test_compilation_changes_neither_results_nor_names(tokenizer_release, tmp_path):
    # The generator only: compiling the many shapes of a tokenizer takes minutes on two cores.
    settings = [*GENERATOR, f"task.tokenizer={tokenizer_release}", "trainer.max_steps=3", "task.optimizer.lr=1e-4"]
    settings += [f"generator.{name}_dropout=0" for name in ("token", "residual", "ffn")]
    eager = run(tmp_path / "eager", *settings)
    compiled = run(tmp_path / "compiled", *settings, "task.compile=true")
    assert column(compiled, "train/loss") == pytest.approx(column(eager, "train/loss"), rel=1e-3)
    states = [load(result.checkpoints / "last.ckpt")["state_dict"] for result in (eager, compiled)]
    assert list(states[0]) == list(states[1])


def test_accumulation_equals_a_larger_batch(tokenizer_release, tmp_path):
    settings = [*GENERATOR, f"task.tokenizer={tokenizer_release}", "trainer.max_steps=3"]
    settings += [f"generator.{name}_dropout=0" for name in ("token", "residual", "ffn")]
    large = run(tmp_path / "large", *settings, "task.batch_size=24")
    small = run(tmp_path / "small", *settings, "task.batch_size=8", "task.accumulate=3", "task.global_batch=24")
    assert column(small, "train/loss") == pytest.approx(column(large, "train/loss"), abs=1e-5)
    assert column(small, "train/grad_norm") == pytest.approx(column(large, "train/grad_norm"), rel=1e-4)


def test_tokenizer_accumulation_equals_a_larger_batch(tmp_path):
    settings = [*TOKENIZER, "trainer.max_steps=3"]
    large = run(tmp_path / "large", *settings, "task.batch_size=24")
    small = run(tmp_path / "small", *settings, "task.batch_size=8", "task.accumulate=3")
    assert column(small, "train/loss") == pytest.approx(column(large, "train/loss"), abs=1e-5)
    norms = [column(result, "train/grad_norm") for result in (small, large)]
    assert norms[0][:2] == pytest.approx(norms[1][:2], rel=1e-3)
    # Adam turns the rounding of tiny gradients into whole steps, and one code that falls the other way shows by then.
    assert norms[0][2] == pytest.approx(norms[1][2], rel=2e-2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_next_run_continues(number, tokenizer_release, tmp_path, monkeypatch):
    settings = [*GENERATOR, f"task.tokenizer={tokenizer_release}", "trainer.max_steps=5"]
    whole = run(tmp_path / "whole", *settings)
    original = GeneratorModule.training_step

    def step(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            os.kill(os.getpid(), number)
        return original(self, batch, batch_idx)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(GeneratorModule, "training_step", step)
    with pytest.raises(InterruptedTrainingError, match=r"last\.ckpt") as stop:
        run(tmp_path / "run", *settings)
    monkeypatch.undo()
    assert stop.value.exit_code == 128 + number
    assert load(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 3
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert column(run(tmp_path / "run", *settings), "train/loss") == column(whole, "train/loss")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    original = TokenizerModule.training_step

    def step(self, batch, batch_idx):
        if self.trainer.global_step == 3:
            batch["pixels"] = batch["pixels"] * float("nan")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TokenizerModule, "training_step", step)
    settings = [*TOKENIZER, "every.log=5", "every.checkpoint=2", "trainer.max_steps=10"]
    with pytest.raises(UserError, match="not finite at step 4"):
        run(tmp_path / "run", *settings)
    good = load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert good["global_step"] == 2
    assert all(value.isfinite().all() for value in good["state_dict"].values())
    assert load(tmp_path / "run" / "checkpoints" / "nonfinite.batch")["pixels"].isnan().all()


def test_time_limit_ends_the_run_with_a_checkpoint(tmp_path):
    result = run(tmp_path / "run", *TOKENIZER, "trainer.max_steps=100000", "trainer.max_time=00:00:00:02")
    step = load(result.checkpoints / "last.ckpt")["global_step"]
    assert 0 < step < 100000
    assert len(column(result, "train/loss")) == step
    assert (result.release / "config.yaml").is_file()


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    store = AtomicCheckpointIO()
    store.save_checkpoint({"step": 1}, path)

    def full(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        store.save_checkpoint({"step": 2}, path)
    assert load(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_step_callbacks_act_once_per_optimizer_step(tokenizer_release, tmp_path, monkeypatch):
    seen = []

    class Spy(StepCallback):
        def on_step(self, trainer, module, batch):
            seen.append(trainer.global_step)

    from vgen.training import run as run_module

    monkeypatch.setattr(run_module, "SaveOnSignal", lambda folder: Spy())
    settings = [*GENERATOR, f"task.tokenizer={tokenizer_release}", "trainer.max_steps=3", "task.accumulate=2"]
    run(tmp_path / "run", *settings)
    assert seen == [1, 2, 3]


def test_validation_pictures_and_release_use_the_averaged_weights(tokenizer_release, tmp_path):
    from safetensors.torch import load_file

    result = run(
        tmp_path / "run",
        *GENERATOR,
        f"task.tokenizer={tokenizer_release}",
        "trainer.max_steps=3",
        "task.ema.decay=0.9",
        "task.ema.warmup=false",
        "every.validate=3",
        "every.pictures=3",
        "pictures=1",
    )
    checkpoint = load(result.checkpoints / "last.ckpt")
    released = load_file(result.release / "model.safetensors")
    for name, average in checkpoint["ema"]["average"].items():
        assert torch.equal(released[name], average), name
    moved = [name for name in released if not torch.equal(released[name], checkpoint["state_dict"][f"network.{name}"])]
    assert moved
    best = load(result.checkpoints / "best.ckpt")
    # The state saved right after validation holds the network's own weights again.
    assert same(best["state_dict"], checkpoint["state_dict"])
    assert [path.name for path in result.pictures.iterdir()] == ["step-00000003.png"]


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_finished_run_only_writes_its_release_again(decay, tmp_path):
    settings = [*TOKENIZER, "trainer.max_steps=2", f"task.ema.decay={decay}"]
    first = run(tmp_path / "run", *settings)
    weights = (first.release / "model.safetensors").read_bytes()
    log = first.metrics.read_text()
    shutil.rmtree(first.release)
    again = run(tmp_path / "run", *settings)
    assert (again.release / "model.safetensors").read_bytes() == weights
    assert again.metrics.read_text() == log


def test_broken_images_are_named_at_the_end(tmp_path, capsys):
    run(tmp_path / "run", *TOKENIZER, "trainer.max_steps=1", "data._target_=tests.training.helpers.broken_digits")
    assert "1 broken image was skipped:\n  digit 7.png (empty)" in capsys.readouterr().err
