"""The two stages of FlexTok, on tiny networks."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.training.helpers import COMMON, GENERATOR, TOKENIZER, column, composed, load, run, same
from vgen.checkpoints.release import load_pipeline, load_tokenizer, load_vae
from vgen.errors import UserError
from vgen.sampling.settings import Guidance, Sampling
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
    assert column(result, "val/gain")[-1] > 0
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


@pytest.fixture(scope="module")
def flextok_release(vae_release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flextok")
    return run(folder / "run", *FLEXTOK, f"task.vae={vae_release}", "trainer.max_steps=1").release


def test_a_generator_on_its_tokens_makes_pictures_of_every_length(flextok_release, tmp_path):
    settings = [
        *GENERATOR,
        "generator=flextok_ar_digits",
        f"task.tokenizer={flextok_release}",
        "task.optimizer.lr=5e-3",
    ]
    result = run(tmp_path / "run", *settings, "every.pictures=25", "pictures=1", "trainer.max_steps=25")
    loss = column(result, "train/loss")
    assert sum(loss[-5:]) < 0.9 * sum(loss[:5])
    labels, index = torch.tensor([1, 7]), torch.tensor([0, 5])
    for count in (1, 3, None):
        pipeline = load_pipeline(result.release, device=torch.device("cpu"), num_tokens=count)
        assert pipeline.generate(labels, index, Sampling()).shape == (2, 3, 8, 8)
        assert pipeline.generate_ids(labels, index, Sampling()).shape == (2, count or 4)


def test_a_generator_on_text_learns_from_a_file_of_features_and_draws_prompts(flextok_release, tmp_path):
    torch.manual_seed(0)
    captions, prompts = tmp_path / "captions.safetensors", tmp_path / "prompts.safetensors"
    save_file({"features": torch.randn(10, 3, 6)}, captions)
    save_file({"features": torch.randn(4, 3, 6)}, prompts)
    text = ["+generator.condition.num_features=null", "+generator.condition.caption_dim=null"]
    settings = [*GENERATOR, "generator=flextok_ar_text_d12", f"task.tokenizer={flextok_release}"]
    sizes = ["generator.dim=16", "generator.depth=1", "generator.heads=2", "trainer.max_steps=2"]
    given = [*settings, *sizes, *text, f"task.text_features={captions}"]
    result = run(tmp_path / "run", *given, "every.pictures=2", "pictures=1", "every.validate=2")
    assert column(result, "val/loss")
    assert len(list(result.pictures.iterdir())) == 1
    load = {"device": torch.device("cpu"), "num_tokens": 2}
    pipeline = load_pipeline(result.release, text_features=prompts, **load)
    assert pipeline.num_classes == 4
    labels, guided = torch.tensor([0, 3]), Sampling(guidance=Guidance(scale=2.0))
    assert pipeline.generate(labels, torch.arange(2), guided).shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match="class label 5 is out of range"):
        pipeline.generate(torch.tensor([5]), torch.arange(1), guided)
    with pytest.raises(UserError, match="give text_features"):
        load_pipeline(result.release, **load)
    wrong = tmp_path / "wrong.safetensors"
    save_file({"features": torch.randn(9, 3, 6)}, wrong)
    for change, message in (
        ([*settings, *sizes], "none is given"),
        ([*given[:-1], f"task.text_features={wrong}"], "the file has 9 captions"),
        ([*given, "generator.condition.caption_dim=7"], "caption_dim=7 does not fit"),
        ([*settings, "generator=digits", f"task.text_features={captions}"], "no effect on this generator"),
        ([*settings, *sizes, f"task.text_features={tmp_path / 'no.safetensors'}"], "no weight file"),
    ):
        with pytest.raises(UserError, match=message):
            build_parts(resolve(composed(*change)))


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


def test_measured_codes_begin_with_every_level_in_use(vae_release):
    def outputs(*overrides):
        parts = parts_of(vae_release, *overrides)
        source = parts.source.train.without_augmentation()
        pixels = torch.stack([source[i]["pixels"] for i in range(len(source))])
        tokenizer = parts.module.tokenizer
        with torch.no_grad():
            z = tokenizer.encoder(tokenizer.latents(pixels))
        return z, [len(channel.unique()) for channel in tokenizer.fsq(z)[0].flatten(0, 1).unbind(1)]

    z, used = outputs("task.measure_codes=true")
    assert torch.allclose(z.mean((0, 1)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(z.std((0, 1)), torch.ones(3), atol=1e-2)
    assert used == [8, 5, 5]
    assert min(outputs("task.measure_codes=false")[0].mean((0, 1)).abs()) > 0.05


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_codes_beyond_the_steep_part_of_the_bound_are_pulled_back(vae_release, weight):
    module = parts_of(vae_release, f"task.saturation_weight={weight}").module
    encoder = module.tokenizer.encoder
    with torch.no_grad():
        encoder.head.bias.copy_(torch.tensor([0.0, 8.0, -8.0]))
    batch = {"pixels": torch.rand(6, 3, 8, 8) * 2 - 1, "index": torch.arange(6)}
    with torch.no_grad():
        z = encoder(module.tokenizer.latents(batch["pixels"])).flatten(0, 1)
    module.training_step(batch, 0).backward()
    # The decoder's last layer is zero at first: nothing else moves the encoder.
    excess = z.sign() * (z.abs() - 1.5).clamp(min=0)
    assert torch.allclose(encoder.head.bias.grad, weight * 2 * excess.mean(0) / 3, atol=1e-5)
    assert (excess.mean(0).abs() > 1).tolist() == [False, True, True]


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
        ("task.saturation_weight=-1", r"task\.saturation_weight=-1"),
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
