"""Every mistake of a user ends in one clear error before any work."""

import os
import stat

import pytest
import torch
from hydra.errors import ConfigCompositionException

from tests.training.helpers import GENERATOR, TOKENIZER, composed, load, run
from vgen.errors import UserError
from vgen.training import run as run_module


@pytest.fixture(autouse=True)
def _no_work(monkeypatch):
    def fit(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr(run_module.pl.Trainer, "fit", fit)


@pytest.mark.parametrize("override", ["task.optimizer.lrr=1", "trainer.max_step=3", "nonsense=1"])
def test_unknown_key(override):
    with pytest.raises(ConfigCompositionException, match=override.split("=")[0]):
        composed(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps=0", "trainer.max_steps=0"),
        ("every.log=0", "every.log=0"),
        ("every.validate=-1", "every.validate=-1"),
        ("task.batch_size=0", "task.batch_size=0"),
        ("task.ema.decay=1", "task.ema.decay"),
        ("task.clip=-1", "task.clip"),
        ("matmul_precision=low", "matmul_precision=low"),
        ("task.lr_schedule.shape=cosin", "cosin"),
        ("trainer.precision=16-mixed", "bf16-mixed"),
        ("task.global_batch=100", "task.global_batch=100 .* = 8"),
        ("generator=digits", "~generator"),
        ("tokenizer.image_size=16", "data.image_size=8 .*tokenizer.image_size=16"),
        ("resume=/nowhere/last.ckpt", "/nowhere/last.ckpt"),
        ("task.loss.perceptual=lipps", "lipps"),
        ("tokenizer.l2_normalize=perhaps", "tokenizer.l2_normalize=perhaps must be true or false"),
    ],
)
def test_tokenizer_settings(override, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", *TOKENIZER, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+generator.vocab_size=33", "generator.vocab_size=33 .*32"),
        ("+generator.grid=[4,4]", r"generator.grid=\[4, 4\] .*\[2, 2\]"),
        ("+generator.condition.num_classes=7", "num_classes=7 .*10"),
        ("generator.heads=3", "generator.heads=3"),
        ("generator.tied_output=perhaps", "generator.tied_output=perhaps must be true or false"),
        ("task.condition_dropout=1.5", "condition_dropout"),
        ("task.tokenizer=/nowhere", "task.tokenizer=/nowhere"),
        ("sampling.temperature=0", "sampling.temperature=0"),
        ("sampling.guidance.scale=-1", "sampling.guidance.scale=-1"),
        ("data.image_size=16", "data.image_size=16 .*tokenizer.image_size=8"),
        ("schedule._target_=vgen.schedules.nothing", "schedule"),
    ],
)
def test_generator_settings(override, message, tokenizer_release, tmp_path):
    settings = [*GENERATOR, f"task.tokenizer={tokenizer_release}", "every.pictures=5"]
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", *settings, override)


def test_missing_value_is_named(tmp_path):
    with pytest.raises(UserError, match=r"task\.tokenizer"):
        run(tmp_path / "run", *GENERATOR)


def test_tokenizer_release_without_weights(tmp_path):
    (tmp_path / "release").mkdir()
    with pytest.raises(UserError, match=r"config\.yaml"):
        run(tmp_path / "run", *GENERATOR, f"task.tokenizer={tmp_path / 'release'}")


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir"):
        run(tmp_path / "file" / "run", *TOKENIZER)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UserError, match="run_dir"):
        run(tmp_path / "run", *TOKENIZER)


@pytest.fixture
def finished(tokenizer_release):
    """Checkpoint of the session's tokenizer run."""
    return tokenizer_release.parent / "checkpoints" / "last.ckpt"


def test_truncated_checkpoint(finished, tmp_path):
    path = tmp_path / "half.ckpt"
    path.write_bytes(finished.read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated"):
        run(tmp_path / "run", *TOKENIZER, f"resume={path}")


def test_foreign_checkpoint(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}, "epoch": 1}, path)
    with pytest.raises(UserError, match="not a vgen training checkpoint"):
        run(tmp_path / "run", *TOKENIZER, f"resume={path}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer.z_channels=16", "another architecture: .*shape"),
        ("tokenizer.num_res_blocks=2", "another architecture: .*lacks network"),
        ("task.ema.decay=0.9", "task.ema.decay"),
    ],
)
def test_checkpoint_of_another_configuration(override, message, finished, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", *TOKENIZER, override, f"resume={finished}")


def test_checkpoint_of_another_task(finished, tokenizer_release, tmp_path):
    with pytest.raises(UserError, match="trained a tokenizer"):
        run(tmp_path / "run", *GENERATOR, f"task.tokenizer={tokenizer_release}", f"resume={finished}")


def test_checkpoint_of_other_data_order(finished, tmp_path, monkeypatch):
    assert load(finished)["global_step"] == 2
    monkeypatch.undo()
    with pytest.raises(UserError, match="seed"):
        run(tmp_path / "run", *TOKENIZER, "seed=1", f"resume={finished}", "trainer.max_steps=3")


def test_never_refuses_an_existing_run(finished):
    with pytest.raises(UserError, match="resume=never"):
        run(finished.parents[1], *TOKENIZER, "resume=never")
