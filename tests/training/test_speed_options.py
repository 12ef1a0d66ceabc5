"""Ways to compute a training step that must not change what is learned."""

import pytest

from tests.training.helpers import GENERATOR, column, run
from vgen.errors import UserError

STILL = [f"generator.{name}_dropout=0" for name in ("token", "residual", "ffn")]


@pytest.mark.parametrize("schedule", ["raster", "neighboring"])
def test_a_fused_loss_trains_as_the_plain_one(schedule, tokenizer_release, tmp_path):
    settings = [*GENERATOR, f"task.tokenizer={tokenizer_release}", "trainer.max_steps=3", f"schedule={schedule}"]
    fused = run(tmp_path / "fused", *settings, *STILL, "task.fused_loss=true", "task.label_smoothing=0.1")
    plain = run(tmp_path / "plain", *settings, *STILL, "task.fused_loss=false", "task.label_smoothing=0.1")
    for name in ("loss", "accuracy", "grad_norm"):
        assert column(fused, f"train/{name}") == pytest.approx(column(plain, f"train/{name}"), rel=1e-4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task.fused_loss=perhaps", r"task\.fused_loss=perhaps"),
        ("task.compile_group=2", r"task\.compile_group=2 has no effect"),
        ("task.residual=float16", r"task\.residual=float16"),
        ("task.residual=bfloat16", r"needs trainer\.precision=bf16-mixed"),
        ("task.fused_rotation=perhaps", r"task\.fused_rotation=perhaps is unknown; choose true or false"),
        (["task.fused_rotation=true", "generator.qk_norm=rms"], r"without norms of queries and keys; set it to false"),
        (["task.fused_rotation=true", "generator.rope=none"], r"knows networks with rotary codes"),
        ("task.fused_rotation=true", r"task\.fused_rotation=true is not available: .*set it to false"),
    ],
)
def test_options_that_cannot_be_met_are_refused(setting, message, tokenizer_release, tmp_path):
    words = [*GENERATOR, f"task.tokenizer={tokenizer_release}", "trainer.max_steps=1"]
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", *words, *([setting] if isinstance(setting, str) else setting))


def test_a_narrow_residual_stream_trains(tokenizer_release, tmp_path):
    words = [*GENERATOR, f"task.tokenizer={tokenizer_release}", "trainer.max_steps=2", "trainer.precision=bf16-mixed"]
    wide = run(tmp_path / "wide", *words, *STILL)
    narrow = run(tmp_path / "narrow", *words, *STILL, "task.residual=bfloat16")
    assert column(narrow, "train/loss") != column(wide, "train/loss")
    assert column(narrow, "train/loss") == pytest.approx(column(wide, "train/loss"), rel=0.02)
