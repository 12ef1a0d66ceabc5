"""TiTok in one and two stages, and generators on its tokens by configuration alone."""

import csv

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.evaluation.helpers import compose_config
from tests.training.helpers import COMMON, GENERATOR, column, load, run
from vgen.checkpoints.release import load_pipeline, load_tokenizer
from vgen.errors import UserError
from vgen.evaluation.job import evaluate
from vgen.sampling.settings import Sampling

VIT = "{width: 16, layers: 1, heads: 2}"
TITOK = [
    *COMMON,
    "tokenizer=titok_digits",
    "tokenizer.image_size=8",
    "data.image_size=8",
    "tokenizer.num_latent_tokens=3",
    "tokenizer.token_size=4",
    f"tokenizer.encoder={VIT}",
    f"tokenizer.decoder={VIT}",
    "tokenizer.codebook_size=32",
    "tokenizer.usage_window=64",
    "task.lr_schedule.warmup=0",
    "task.optimizer.lr=3e-3",
    "task.batch_size=8",
]
SINGLE = ["task=titok_single", *TITOK, "task.loss.perceptual=none", "task.loss.adversarial_weight=0"]
ADVERSARIAL = [
    "task.loss.adversarial_weight=0.1",
    "task.loss.adversarial_start=3",
    "task.discriminator.base_channels=32",
    "task.discriminator.num_stages=1",
]
PROXY = ["tokenizer.head=proxy", "tokenizer.proxy_codebook_size=32"]
STAGE1 = ["task=titok_stage1", *TITOK, *PROXY, "tokenizer.proxy_mix=hard"]
STAGE2 = ["task=titok_stage2", *TITOK, *PROXY, "task.loss.perceptual=none"]


@pytest.fixture(scope="module")
def first_stage(tokenizer_release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage1") / "run"
    steps = ["trainer.max_steps=30", "every.validate=15", "every.pictures=30", "pictures=2"]
    return run(folder, *STAGE1, f"task.teacher={tokenizer_release}", *steps)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single") / "run", *SINGLE, "trainer.max_steps=2")


def header(result):
    with result.metrics.open() as file:
        return set(next(csv.reader(file)))


def test_the_first_stage_learns_the_teachers_codes(first_stage, tokenizer_release):
    losses = column(first_stage, "train/proxy")
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert {"train/accuracy", "train/vq", "train/codebook_usage", "val/psnr", "val/proxy"} <= header(first_stage)
    assert not any("reconstruction" in name for name in header(first_stage))
    assert [path.name for path in first_stage.pictures.iterdir()] == ["step-00000030.png"]
    released, teacher = load_tokenizer(first_stage.release), load_tokenizer(tokenizer_release)
    assert torch.equal(released.pixel_quantize.embedding.weight, teacher.codebook)
    for name, value in teacher.pixel_decoder_state().items():
        assert torch.equal(released.pixel_decoder.state_dict()[name], value), name
    # What the first stage shows are pictures of codes, made exactly as the teacher makes them.
    ids = released.encode(torch.zeros(1, 3, 8, 8))
    logits = released.decoder(released.quantize.lookup(ids).transpose(1, 2).unsqueeze(2))
    assert torch.allclose(released.decode(ids), teacher.decode(logits.argmax(1).flatten(1)), atol=1e-5)


def test_the_second_stage_tunes_the_decoder_only(first_stage, tmp_path):
    settings = [*STAGE2, *ADVERSARIAL, f"task.init_from={first_stage.release}", "trainer.max_steps=5"]
    run(
        tmp_path / "from_zero",
        *settings[:-1],
        "task.loss.adversarial_start=0",
        "trainer.max_steps=1",
        "every.validate=1",
    )
    result = run(tmp_path / "run", *settings)
    before, after = (load_file(r.release / "model.safetensors") for r in (first_stage, result))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name.split(".")[0] for name in changed - {"quantize.codebook_used"}} == {
        "decoder",
        "pixel_quantize",
        "pixel_decoder",
    }
    checkpoint = load(result.checkpoints / "last.ckpt")
    assert checkpoint["state_dict"]["lecam.ema_real"] != 0
    assert len(column(result, "train/lecam")) == 3
    again = run(tmp_path / "run", *settings[:-1], "trainer.max_steps=6")
    assert len(column(again, "train/lecam")) == 4


def test_a_maskgit_vqgan_trained_here_may_teach(tmp_path):
    sizes = {"image_size": 8, "base_channels": 8, "multipliers": "[1,1,1]", "num_res_blocks": 1, "z_channels": 8}
    sizes |= {"codebook_size": 32, "norm_groups": 4, "usage_window": 64}
    settings = [f"tokenizer.{name}={value}" for name, value in sizes.items()]
    steps = ["trainer.max_steps=2", "task.batch_size=8", "data.image_size=8"]
    teacher = run(tmp_path / "teacher", *COMMON, "task=tokenizer", "tokenizer=maskgit_vqgan", *settings, *steps)
    result = run(tmp_path / "run", *STAGE1, f"task.teacher={teacher.release}", "trainer.max_steps=2")
    pictures = load_tokenizer(result.release).reconstruct(torch.zeros(1, 3, 8, 8))
    codes = load_tokenizer(teacher.release).codebook
    assert pictures.shape == (1, 3, 8, 8)
    assert torch.equal(load_tokenizer(result.release).pixel_quantize.embedding.weight, codes)


def test_the_discriminator_follows_its_own_schedule(tmp_path):
    rates = ["task.discriminator_lr_schedule.warmup=4", "task.discriminator_lr_schedule.shape=constant"]
    result = run(tmp_path / "run", *SINGLE, *ADVERSARIAL, *rates, "trainer.max_steps=4")
    last = load(result.checkpoints / "last.ckpt")["optimizer_states"]
    network, discriminator = (state["param_groups"][0]["lr"] for state in last)
    # Cosine from zero at step 3 of 4; the discriminator is at its second step of a rise over four from zero.
    assert network == pytest.approx(3e-3 * (1 - 0.9 * 0.5 * (1 - torch.cos(torch.tensor(0.75 * torch.pi)).item())))
    assert discriminator == pytest.approx(3e-3 * 0.25)


def test_continuous_latents_train_and_show_pictures(tmp_path):
    settings = ["tokenizer.bottleneck=gaussian", "tokenizer.codebook_size=0", "every.validate=2", "every.pictures=2"]
    result = run(tmp_path / "run", *SINGLE, *settings, "trainer.max_steps=2", "pictures=2")
    assert {"train/kl", "val/psnr"} <= header(result)
    assert "train/codebook_usage" not in header(result)
    wanted = ["device=cpu", "data=digits", "data.image_size=8", "evaluation.metrics=[psnr,codebook]"]
    report = evaluate(compose_config(f"checkpoint={result.release}", *wanted))
    assert set(report["metrics"]) == {"psnr"}
    assert "continuous" in report["skipped"]["codebook"]
    with pytest.raises(UserError, match="no token ids"):
        run(tmp_path / "gen", *GENERATOR, f"task.tokenizer={result.release}", "trainer.max_steps=1")


def test_text_features_of_classes_reach_the_decoder(tmp_path):
    path = tmp_path / "features.safetensors"
    save_file({"features": torch.randn(10, 3, 6)}, path)
    text = ["tokenizer.text_length=3", "tokenizer.text_dim=6", "trainer.max_steps=2"]
    result = run(tmp_path / "run", *SINGLE, *text, f"task.text_features={path}")
    weights = load(result.checkpoints / "last.ckpt")["state_dict"]
    optimizer = load(result.checkpoints / "last.ckpt")["optimizer_states"][0]["state"]
    assert "network.decoder.text_guidance_proj.weight" in weights
    assert len(optimizer) == sum(1 for name in weights if "quantize.codebook_used" not in name and "prob" not in name)
    save_file({"features": torch.randn(9, 3, 6)}, path)
    for extra, message in (
        ([f"task.text_features={path}"], r"must hold features \[10, 3, 6\], found \[9, 3, 6\]"),
        ([], "give task.text_features"),
        (["tokenizer.text_length=0", f"task.text_features={path}"], "no effect"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "bad", *SINGLE, *text, *extra)


def test_a_raster_generator_trains_and_samples_on_the_tokens(single, tmp_path):
    settings = [*GENERATOR, f"task.tokenizer={single.release}", "task.cache_codes=true", "trainer.max_steps=2"]
    result = run(tmp_path / "run", *settings)
    pipeline = load_pipeline(result.release, device=torch.device("cpu"))
    assert pipeline.plan.grid == (3,)
    pictures = pipeline.generate(torch.tensor([1, 7]), torch.tensor([0, 1]), Sampling())
    assert pictures.shape == (2, 3, 8, 8)
    # The cached codes are the tokenizer's own.
    (codes,) = (tmp_path / "cache").rglob("train/codes.npy")
    assert codes.exists()
    for order in ("diagonal", "parallel", "zipar"):
        with pytest.raises(UserError, match=rf"{order}.*\(3,\)"):
            run(tmp_path / order, *settings, f"schedule={order}")


def test_digits_recipe_learns(tmp_path):
    settings = ["experiment=digits_titok", "num_threads=1", "every={log: 5, validate: 0, pictures: 0, checkpoint: 50}"]
    result = run(tmp_path / "run", *settings, "trainer.max_steps=25", "task.lr_schedule.warmup=5", "task.batch_size=32")
    losses = column(result, "train/reconstruction")
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([*STAGE1, "task.teacher=/nowhere"], "task.teacher=/nowhere does not exist.*--preset maskgit_vqgan"),
        ([*STAGE1, "task.teacher={single}"], "is a TiTok; it must be a VQGAN"),
        (
            [*STAGE1, "task.teacher={teacher}", "tokenizer.proxy_codebook_size=64"],
            "proxy_codebook_size=64 does not fit",
        ),
        ([*STAGE1, "task.teacher={teacher}", "tokenizer.patch_size=2"], "2 x 2 codes .*set tokenizer.patch_size=4"),
        ([*STAGE1, "task.teacher={teacher}", "tokenizer.image_size=16"], "image_size=16 differs from the teacher's 8"),
        ([*STAGE1, "task.teacher={teacher}", "tokenizer.head=pixel"], "head=proxy; for head=pixel use"),
        ([*STAGE2, "task.init_from=/nowhere"], "task.init_from=/nowhere does not exist"),
        ([*STAGE2, "task.init_from={single}"], "proxy_codebook_size=32 does not fit that of task.init_from, None"),
        ([*SINGLE, "task.init_from={single}", "tokenizer.l2_normalize=true"], "l2_normalize=True differs from False"),
        ([*SINGLE, "task.init_from={single}", "tokenizer.codebook_size=16"], "does not fit the configured network"),
        ([*SINGLE, "task.train_only=[decodr.]"], "decodr.; the network's parts are .*decoder"),
        ([*SINGLE, "tokenizer.image_size=16"], "data.image_size=8 differs from tokenizer.image_size=16"),
    ],
)
def test_mistakes_end_before_work(settings, message, single, tokenizer_release, tmp_path, monkeypatch):
    from vgen.training import run as run_module

    monkeypatch.setattr(run_module.pl.Trainer, "fit", lambda *_, **__: pytest.fail("training began"))
    places = {"single": single.release, "teacher": tokenizer_release}
    with pytest.raises(UserError, match=message):
        run(
            tmp_path / "run",
            *(entry.format(**places) if "{single" in entry or "{teach" in entry else entry for entry in settings),
            "trainer.max_steps=1",
        )


def test_noise_of_a_gaussian_depends_on_the_batch_alone(tmp_path):
    settings = [*SINGLE, "tokenizer.bottleneck=gaussian", "tokenizer.codebook_size=0", "trainer.max_steps=3"]
    losses = [column(run(tmp_path / name, *settings), "train/reconstruction") for name in ("a", "b")]
    assert losses[0] == losses[1]
