"""The two stages of FlexTok, on tiny networks."""

import json
from dataclasses import replace

import pytest
import torch

from tests.training.helpers import COMMON, GENERATOR, TOKENIZER, column, composed, load, run, same
from vgen.checkpoints.release import load_tokenizer, load_vae
from vgen.errors import UserError
from vgen.tokenizers.flextok import FlexTok
from vgen.training.parts import build_parts, measured_scale
from vgen.training.settings import resolve

VAE = [
    *COMMON,
    "task=vae",
    "tokenizer=vae_digits",
    "tokenizer.image_size=8",
    "data.image_size=8",
    "tokenizer.block_channels=[8,8]",
    "task.optimizer.lr=1e-2",
    "task.batch_size=8",
]
FLEXTOK = [
    *COMMON,
    "task=flextok",
    "tokenizer=flextok_digits",
    "tokenizer.vae.image_size=8",
    "data.image_size=8",
    "tokenizer.vae.block_channels=[8,8]",
    "tokenizer.num_tokens=4",
    "tokenizer.encoder={dim:16,depth:1,head_dim:8}",
    "tokenizer.decoder={dim:16,depth:2,head_dim:8}",
    "tokenizer.decoding.steps=2",
    "task.optimizer.lr=5e-3",
    "task.batch_size=16",
]


@pytest.fixture(scope="module")
def vae_release(tmp_path_factory):
    return run(tmp_path_factory.mktemp("vae") / "run", *VAE, "trainer.max_steps=60").release


def parts_of(vae_release, *overrides):
    return build_parts(resolve(composed(*FLEXTOK, f"task.vae={vae_release}", *overrides)))


def test_the_vae_learns_and_is_released(vae_release):
    loss = column_of(vae_release, "train/loss")
    assert sum(loss[-5:]) < 0.7 * sum(loss[:5])
    vae, config = load_vae(vae_release)
    assert config["latent_channels"] == vae.latent_channels == 4


def column_of(release, name):
    import csv

    with (release.parent / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_the_vae_with_a_discriminator_logs_pictures_and_no_code_use(tmp_path):
    settings = ["task.loss.adversarial_weight=0.1", "task.loss.adversarial_start=1", "task.discriminator.num_layers=1"]
    settings += ["task.ema.decay=0.5", "every.validate=2", "every.pictures=2", "pictures=3"]
    result = run(tmp_path / "run", *VAE, *settings, "trainer.max_steps=2")
    assert column(result, "val/psnr")
    assert len(column(result, "train/discriminator")) == 2
    assert "codebook_usage" not in result.metrics.read_text()
    assert len(list(result.pictures.iterdir())) == 1


def test_flextok_learns_and_its_release_decodes_prefixes(vae_release, tmp_path):
    settings = [f"task.vae={vae_release}", "task.ema.decay=0.9", "every.validate=60", "every.pictures=60", "pictures=3"]
    result = run(tmp_path / "run", *FLEXTOK, *settings, "trainer.max_steps=60")
    loss = column(result, "train/loss")
    assert sum(loss[-10:]) < 0.8 * sum(loss[:10])
    assert column(result, "val/loss")
    tokenizer = load_tokenizer(result.release)
    assert isinstance(tokenizer, FlexTok)
    assert same(tokenizer.vae.state_dict(), load_vae(vae_release)[0].state_dict())
    assert tokenizer.vae.scaling_factor != 1.0
    ids = tokenizer.encode(torch.zeros(2, 3, 8, 8))
    assert tokenizer.decode(ids[:, :1]).shape == (2, 3, 8, 8)
    # Originals, then 1 and 4 tokens.
    from PIL import Image

    width, height = Image.open(next(result.pictures.iterdir())).size
    assert height == pytest.approx(width, rel=0.05)
    raster = [*GENERATOR, f"task.tokenizer={result.release}", "trainer.max_steps=1", "task.cache_codes=true"]
    assert column(run(tmp_path / "generator", *raster), "train/loss")


def test_resume_continues_exactly(vae_release, tmp_path):
    settings = [*FLEXTOK, f"task.vae={vae_release}", "task.ema.decay=0.9", "every.checkpoint=3", "every.validate=3"]
    settings += ["task.accumulate=2", "task.lr_schedule.total=6"]
    whole = run(tmp_path / "whole", *settings, "trainer.max_steps=6")
    run(tmp_path / "part", *settings, "trainer.max_steps=4")
    resumed = run(tmp_path / "part", *settings, "trainer.max_steps=6")
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert column(resumed, name) == column(whole, name), name
    ends = [load(result.checkpoints / "last.ckpt") for result in (whole, resumed)]
    for name in ("state_dict", "ema", "optimizer_states"):
        assert same(ends[0][name], ends[1][name]), name


@pytest.mark.parametrize("kind", ["mode", "logit_normal"])
def test_the_loss_of_a_picture_does_not_depend_on_its_batch(vae_release, kind):
    module = parts_of(vae_release, f"task.times.kind={kind}", "task.sample_posterior=true").module
    torch.nn.init.normal_(module.tokenizer.decoder.head.weight)
    batch = {"pixels": torch.rand(6, 3, 8, 8) * 2 - 1, "index": torch.arange(100, 106)}
    with torch.no_grad():
        together = module.objective(batch, 3, null_probability=0.5)[0]
        halves = [
            module.objective({name: value[part] for name, value in batch.items()}, 3, null_probability=0.5)[0]
            for part in (slice(0, 2), slice(2, 6))
        ]
        assert torch.allclose(together, (2 * halves[0] + 4 * halves[1]) / 6, atol=1e-5)
        assert not torch.allclose(together, module.objective(batch, 4, null_probability=0.5)[0])


def test_the_measured_scale_makes_latents_of_unit_spread(vae_release):
    parts = parts_of(vae_release)
    source = parts.source.train.without_augmentation()
    pixels = torch.stack([source[i]["pixels"] for i in range(len(source))])
    assert parts.module.tokenizer.latents(pixels).std().item() == pytest.approx(1.0, abs=0.01)
    kept = parts_of(vae_release, "task.measure_scale=false")
    assert kept.network["vae"]["scaling_factor"] == 1.0
    one = measured_scale(parts.module.tokenizer.vae, replace(parts.source).train, pixels=1)
    assert one > 0


def test_only_the_transformers_are_trained(vae_release):
    module = parts_of(vae_release, "task.encoder_lr_scale=0.5").module
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained
    assert not any(".vae." in name for name in trained)
    optimizer = module.configure_optimizers()
    slow = [group for group in optimizer.param_groups if group.get("lr_scale") == 0.5]
    assert sum(len(group["params"]) for group in slow) == len(list(module.tokenizer.encoder.parameters()))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.lengths=all", "task.lengths=all"),
        ("task.null_probability=1", "null_probability"),
        ("task.times.kind=cosine", "times.kind=cosine"),
        ("task.repa.weight=1", r"repa\.path=None.*task\.repa\.weight=0"),
        ("tokenizer.vae.latent_channels=3", "latent_channels=3 does not fit"),
        ("data.image_size=16", "data.image_size=16"),
        ("task.vae=/nowhere", "/nowhere"),
        ("tokenizer=vq_digits", "tokenizer"),
    ],
)
def test_bad_settings(vae_release, override, message, tmp_path):
    settings = [name for name in FLEXTOK if not (override.startswith("tokenizer=") and name.startswith("tokenizer"))]
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", *settings, f"task.vae={vae_release}", override)


@pytest.mark.parametrize(("task", "settings"), [("tokenizer", VAE), ("vae", TOKENIZER)])
def test_a_network_of_another_task(task, settings, tmp_path):
    with pytest.raises(UserError, match=f"task={task} trains a"):
        run(tmp_path / "run", *[name for name in settings if not name.startswith("task=")], f"task={task}")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A folder with a tiny DINOv2 of random weights."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("dinov2")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
    return folder


def test_repa_trains_a_projector_that_is_not_released(vae_release, dinov2, tmp_path):
    settings = [f"task.vae={vae_release}", "task.repa.weight=0.5", f"task.repa.path={dinov2}"]
    settings += ["task.repa.image_size=56", "task.repa.hidden=8", "trainer.max_steps=30"]
    result = run(tmp_path / "run", *FLEXTOK, *settings)
    aligned = column(result, "train/repa")
    assert aligned[-1] < aligned[0] - 0.05
    names = load(result.checkpoints / "last.ckpt")["state_dict"]
    assert any(name.startswith("repa.projector.") for name in names)
    assert not any("embeddings" in name for name in names)
    assert isinstance(load_tokenizer(result.release), FlexTok)


def test_repa_of_another_network(vae_release, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="describes a bert"):
        run(tmp_path / "run", *FLEXTOK, f"task.vae={vae_release}", "task.repa.weight=1", f"task.repa.path={tmp_path}")
