"""Clips through the training loop: tokenizers, cached codes, generators on (T, H, W), picture strips."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.training.helpers import column, composed, load, run
from vgen.checkpoints.release import load_pipeline
from vgen.data.moving_digits import moving_digits
from vgen.data.source import DataSource
from vgen.errors import UserError
from vgen.sampling.settings import Sampling
from vgen.training.parts import build_parts
from vgen.training.settings import check, resolve


def few_clips(**settings) -> DataSource:
    source = moving_digits(**settings)
    return replace(source, val=source.val.subset(torch.arange(8)))


COMMON = [
    "data=moving_digits",
    "data._target_=tests.training.test_video.few_clips",
    "data.image_size=16",
    "data.num_frames=5",
    "data.digit_size=8",
    "data.train_clips=32",
    "data.val_clips=10",
    "trainer=cpu",
    "num_threads=1",
    "pictures=2",
    "every.log=1",
    "every.validate=2",
    "every.pictures=2",
    "every.checkpoint=1000",
    "trainer.max_steps=2",
    "task.batch_size=4",
]
CAUSAL = [
    *COMMON,
    "tokenizer=causal3d_digits",
    "tokenizer.image_size=16",
    "tokenizer.num_frames=5",
    "tokenizer.base_channels=4",
    "tokenizer.norm_groups=2",
    "tokenizer.z_channels=8",
]
LARP = [
    *COMMON,
    "tokenizer=larp_small",
    "tokenizer.image_size=16",
    "tokenizer.num_frames=5",
    "tokenizer.patch=[5,8,8]",
    "tokenizer.num_tokens=6",
    "tokenizer.encoder_dim=16",
    "tokenizer.encoder_depth=1",
    "tokenizer.decoder_dim=16",
    "tokenizer.decoder_depth=1",
    "tokenizer.prior.depth=1",
    "tokenizer.usage_window=64",
]


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return run(tmp_path_factory.mktemp("causal") / "run", *CAUSAL)


def test_tokenizer_run_leaves_strips_figures_and_a_release(causal):
    # 2 clips, original above reconstruction, 5 frames each; magnified to a readable size.
    with Image.open(sorted(causal.pictures.glob("*.png"))[-1]) as image:
        width, height = image.size
    assert width / height == pytest.approx(5 / 4, abs=0.05)
    assert {"val/psnr", "val/loss", "perplexity"} <= causal.figures.keys()
    assert (causal.release / "model.safetensors").is_file()


def test_generator_trains_on_cached_codes_of_clips(causal, tmp_path):
    generator = ["task=generator", "~tokenizer", "generator=digits", "schedule=raster", "generator.dim=16"]
    generator += ["generator.depth=1", "generator.heads=2", "task.cache_augmentation=flip"]
    common = [entry for entry in COMMON if not entry.startswith("every.pictures")]
    result = run(
        tmp_path / "run", *common, *generator, f"task.tokenizer={causal.release}", "every.pictures=2", "pictures=1"
    )
    assert len(column(result, "train/loss")) == 2
    (codes,) = (tmp_path / "cache" / "codes").iterdir()
    assert codes.name.startswith("moving-digits-")
    # One sample of each of ten classes, a row of 5 frames each.
    with Image.open(sorted(result.pictures.glob("*.png"))[-1]) as image:
        width, height = image.size
    assert width / height == pytest.approx(5 / 10, abs=0.05)


PREDICTION = [
    *COMMON,
    "task=generator",
    "~tokenizer",
    "generator=digits",
    "schedule=neighboring",
    "condition@generator.condition=frames",
    "generator.dim=16",
    "generator.depth=1",
    "generator.heads=2",
    "generator.rope=none",
    "generator.positions=own",
    "task.given_frames=2",
    "task.condition_dropout=0",
    "task.cache_augmentation=flip",
]


def checked_parts(settings):
    check(settings)
    return build_parts(settings)


@pytest.mark.parametrize("cached", [True, False])
def test_frame_prediction_trains_shows_and_samples(causal, tmp_path, cached):
    arguments = [*PREDICTION, f"task.tokenizer={causal.release}", f"task.cache_codes={cached}"]
    result = run(tmp_path / "run", *arguments)
    assert len(column(result, "train/loss")) == len(column(result, "val/loss")) * 2 == 2
    # 2 clips above what is predicted from their first frames, 5 frames each.
    with Image.open(sorted(result.pictures.glob("*.png"))[-1]) as image:
        width, height = image.size
    assert width / height == pytest.approx(5 / 4, abs=0.05)
    data = {"_target_": "vgen.sampling.first_frames.FromData", "data": {**composed(*COMMON).data}}
    data["data"]["_target_"] = "vgen.data.moving_digits.moving_digits"
    pipeline = load_pipeline(result.release, device=torch.device("cpu"), predict=data)
    assert pipeline.given_frames == 2
    assert pipeline.generate(torch.zeros(2, dtype=torch.int64), torch.arange(2), Sampling()).shape == (2, 3, 5, 16, 16)


def test_unconditional_training_and_sampling(causal, tmp_path):
    generator = ["task=generator", "~tokenizer", "generator=digits", "schedule=raster", "generator.dim=16"]
    generator += ["generator.depth=1", "generator.heads=2", "task.condition_dropout=1", "pictures=1"]
    result = run(tmp_path / "run", *COMMON, *generator, f"task.tokenizer={causal.release}")
    pipeline = load_pipeline(result.release, device=torch.device("cpu"))
    labels = pipeline.labels("unconditional", 2, seed=0)
    assert labels.tolist() == [10, 10]
    pipeline.generate(labels, torch.arange(2), Sampling())
    with pytest.raises(UserError, match="trained without labels"):
        pipeline.generate(torch.tensor([1, 2]), torch.arange(2), Sampling())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.given_frames=5"], r"given_frames=5 must lie in 1\.\.4"),
        (["task.given_frames=null"], "give both or neither"),
        (["condition@generator.condition=label"], "give both or neither"),
        (["task.condition_dropout=0.1"], "needs a null condition"),
        (["generator.positions=none"], "a condition of tokens"),
        (["score.every_steps=1"], "score cannot give first frames"),
    ],
)
def test_frame_prediction_that_cannot_work_is_refused(causal, overrides, message):
    settings = resolve(composed(*PREDICTION, f"task.tokenizer={causal.release}", *overrides))
    with pytest.raises(UserError, match=message):
        checked_parts(settings)


def test_adversarial_training_of_clips(tmp_path):
    result = run(
        tmp_path / "run",
        *CAUSAL,
        "discriminator@task.discriminator=patchgan3d",
        "task.discriminator.base_channels=4",
        "task.discriminator.num_layers=2",
        "task.discriminator.time_layers=1",
        "task.loss.adversarial_weight=0.1",
        "task.loss.adversarial_start=1",
        "tokenizer.gradient_checkpointing=true",
        "every.pictures=0",
    )
    assert all(value > 0 for value in column(result, "train/discriminator"))


def test_larp_with_its_losses(tmp_path):
    loss = ["_target_=vgen.losses.larp.LARPLoss", "adversarial_weight=0.3", "adversarial_start=1"]
    loss += ["generator_loss=non-saturating", "+label_noise=0.15", "lecam_weight=1e-6", "+lecam_decay=0.999"]
    loss += ["+discriminator_every=2"]
    result = run(
        tmp_path / "run",
        *LARP,
        *(f"{'+' * entry.startswith('+')}task.loss.{entry.lstrip('+')}" for entry in loss),
        "discriminator@task.discriminator=clip",
        "task.discriminator.dim=16",
        "task.discriminator.depth=1",
        "task.discriminator.heads=2",
    )
    assert column(result, "train/prior")
    # The discriminator learns at the second of the two steps only.
    assert len(column(result, "train/discriminator")) == 1
    running = load(result.checkpoints / "last.ckpt")["state_dict"]["discriminator.running"]
    assert running.abs().max() > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer.num_frames=9"], "clips of 5 frames but tokenizer.num_frames=9"),
        (["tokenizer=vq_digits"], "clips of 5 frames but tokenizer.num_frames=None"),
        (["data=digits"], "data are pictures but tokenizer.num_frames=5"),
    ],
)
def test_clips_and_pictures_are_not_mixed(overrides, message):
    settings = CAUSAL if "data=digits" not in overrides else [entry for entry in CAUSAL if "data" not in entry]
    if "tokenizer=vq_digits" in overrides:
        settings = COMMON
    with pytest.raises(UserError, match=message):
        build_parts(resolve(composed(*settings, *overrides)))
