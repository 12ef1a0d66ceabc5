"""MaskGen by configuration: captions of classes, token ids and continuous tokens, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file

from tests.generators.helpers import captions
from tests.training.helpers import COMMON, GENERATOR, column, load, run, same
from vgen.checkpoints.release import load_pipeline
from vgen.errors import UserError
from vgen.sampling.animation import animate
from vgen.sampling.settings import Sampling
from vgen.training import run as run_module

VIT = "{width: 16, layers: 1, heads: 2}"
TITOK = [
    *COMMON,
    "task=titok_single",
    "tokenizer=titok_digits",
    "tokenizer.image_size=8",
    "data.image_size=8",
    "tokenizer.num_latent_tokens=3",
    "tokenizer.token_size=4",
    f"tokenizer.encoder={VIT}",
    f"tokenizer.decoder={VIT}",
    "tokenizer.text_length=4",
    "tokenizer.text_dim=7",
    "tokenizer.usage_window=64",
    "task.lr_schedule.warmup=0",
    "task.loss.perceptual=none",
    "task.loss.adversarial_weight=0",
    "task.batch_size=8",
    "trainer.max_steps=2",
]
BOTTLENECK = {
    "maskgen_vq_l": ["tokenizer.codebook_size=32"],
    "maskgen_kl_l": ["tokenizer.bottleneck=gaussian", "tokenizer.codebook_size=0"],
}
SCHEDULE = {"maskgen_vq_l": "masked", "maskgen_kl_l": "masked_random"}
SMALL = [word for word in GENERATOR if not word.startswith(("generator=", "schedule=", "task.cache_codes"))]
TEXT = [f"generator.condition.{key}" for key in ("caption_dim=6", "num_features=3", "pooled_dim=5", "score_dim=8")]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Features of ten captions and of the empty string, for generator and tokenizer."""
    path = tmp_path_factory.mktemp("texts") / "texts.safetensors"
    found = captions(10, decoder=(4, 7))
    features = {"features": found.features, "pooled": found.pooled}
    save_file(features | {"decoder_features": found.decoder_features}, path)
    save_file(features, path.with_name("generator_only.safetensors"))
    save_file({"features": found.decoder_features[:10].contiguous()}, path.with_name("tokenizer.safetensors"))
    return path


@pytest.fixture(scope="module")
def tokenizers(texts, tmp_path_factory):
    """Hardly trained text-aware TiToks, with a codebook and with Gaussian latents."""
    told = f"task.text_features={texts.with_name('tokenizer.safetensors')}"
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: run(folder / name, *TITOK, *words, told).release for name, words in BOTTLENECK.items()}


def settings(name, tokenizers, texts, *, tokenizer=None, cached=False):
    """Overrides of a tiny run."""
    sizes = ["generator.latent_head.depth=1"] if name == "maskgen_kl_l" else []
    return [
        *SMALL,
        f"generator={name}",
        f"schedule={SCHEDULE[name]}",
        "schedule.steps=2",
        *TEXT,
        *sizes,
        f"task.tokenizer={tokenizers[tokenizer or name]}",
        f"task.text_features={texts}",
        f"task.cache_codes={str(cached).lower()}",
    ]


@pytest.mark.parametrize("name", BOTTLENECK)
def test_a_run_trains_validates_shows_pictures_and_releases(name, tokenizers, texts, tmp_path):
    more = ["trainer.max_steps=40", "every.validate=20", "every.pictures=40", "pictures=1", "task.ema.decay=0.9"]
    words = settings(name, tokenizers, texts, cached=name == "maskgen_vq_l")
    result = run(tmp_path / "run", *words, *more)
    losses, validation = column(result, "train/loss"), column(result, "val/loss")
    assert len(losses) == 40
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert validation[-1] < validation[0]
    assert (tmp_path / "run" / "pictures" / "step-00000040.png").is_file()
    pipeline = load_pipeline(result.release, device=torch.device("cpu"), text_features=texts)
    sampling = Sampling(diffusion_steps=3 if name == "maskgen_kl_l" else None)
    pictures = pipeline.generate(torch.tensor([1, 10]), torch.tensor([0, 1]), sampling)
    assert pictures.shape == (2, 3, 8, 8)
    animate(pipeline, torch.tensor([1, 10]), torch.tensor([0, 1]), sampling, tmp_path / "decode.gif")
    assert (tmp_path / "decode.gif").is_file()
    with pytest.raises(UserError, match="give text_features"):
        load_pipeline(result.release, device=torch.device("cpu"))


def test_a_resumed_run_of_continuous_tokens_goes_on_as_if_never_stopped(tokenizers, texts, tmp_path):
    words = [*settings("maskgen_kl_l", tokenizers, texts), "every.checkpoint=2"]
    whole = run(tmp_path / "whole", *words, "trainer.max_steps=4", "task.ema.decay=0.9")
    for steps in (2, 4):
        part = run(tmp_path / "part", *words, f"trainer.max_steps={steps}", "task.ema.decay=0.9")
    assert column(part, "train/loss") == column(whole, "train/loss")
    first, second = (load(result.checkpoints / "last.ckpt") for result in (whole, part))
    assert same(first["state_dict"], second["state_dict"])
    assert same(first["ema"], second["ema"])


def test_what_does_not_fit_is_named_before_work(tokenizers, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module.pl.Trainer, "fit", lambda *args, **kwargs: pytest.fail("training began"))
    vq, kl = (settings(name, tokenizers, texts) for name in BOTTLENECK)
    confident = ["schedule=masked" if word.startswith("schedule=") else word for word in kl]
    other = texts.with_name("generator_only.safetensors")
    few = texts.with_name("few.safetensors")
    found = captions(9)
    save_file({"features": found.features, "pooled": found.pooled}, few)
    for words, message in (
        ([*vq, "task.text_features=null"], "conditioned on text: task.text_features must name"),
        ([*vq, f"task.text_features={few}"], "and, last, of the empty string; the file has 9 captions"),
        ([*vq, f"task.text_features={other}"], r"must hold decoder_features \[captions \+ 1, 4, width\]"),
        ([*vq, "generator.condition.pooled_dim=9"], "pooled_dim=9 does not fit task.text_features"),
        (settings("maskgen_vq_l", tokenizers, texts, tokenizer="maskgen_kl_l"), "no token ids; use another"),
        (settings("maskgen_kl_l", tokenizers, texts, tokenizer="maskgen_vq_l"), "has token ids; use another"),
        ([*kl, "task.cache_codes=true"], "set task.cache_codes=false"),
        ([*kl, "task.label_smoothing=0.1"], "label_smoothing and visible_weight have no effect"),
        (confident, "choose schedule=masked_random"),
        ([*kl, "sampling.top_k=3"], "greedy=false, top_k=0"),
        ([*vq, "sampling.diffusion_steps=3"], "diffusion_steps has no effect"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "run", *words, "trainer.max_steps=1")
