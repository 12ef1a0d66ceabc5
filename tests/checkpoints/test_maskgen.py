"""MaskGen's published names: round trips, what the converter refuses, and files that become releases."""

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.generators.helpers import captions
from vgen.checkpoints import __main__ as importer
from vgen.checkpoints.maskgen import SPARE_ROWS, load_maskgen, to_ours, to_published
from vgen.checkpoints.release import build, load_pipeline, save_release
from vgen.errors import UserError
from vgen.generators.transformer import Transformer
from vgen.sampling.settings import Guidance, Sampling

TOKENS = {
    "_target_": "vgen.tokenizers.titok.TiTok",
    "image_size": 16,
    "patch_size": 4,
    "num_latent_tokens": 6,
    "token_size": 4,
    "encoder": {"width": 16, "layers": 1, "heads": 2},
    "decoder": {"width": 16, "layers": 1, "heads": 2},
    "text_length": 4,
    "text_dim": 7,
}
KINDS = {
    "maskgen_vq": {"codebook_size": 20},
    "maskgen_kl": {"bottleneck": "gaussian"},
}
SIZES = {"dim": 32, "depth": 3, "heads": 4}
TEXT = {"caption_dim": 6, "num_features": 3, "pooled_dim": 5}


def generator_of(kind):
    """A small network by the published preset, with random weights."""
    config = importer.generator_preset(f"{kind}_l") | SIZES
    config["condition"] = {**config["condition"], **TEXT, "dim": 32}
    if "latent_head" in config:
        config["latent_head"] = {**config["latent_head"], "dim": 32, "width": 32, "channels": 4, "num_tokens": 6}
    config |= {"vocab_size": 20 if kind == "maskgen_vq" else 0, "grid": [6], "mask_token": True}
    torch.manual_seed(0)
    generator = build({"_target_": "vgen.generators.transformer.Transformer", **config}).eval()
    assert isinstance(generator, Transformer)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return generator


@pytest.mark.parametrize("kind", KINDS)
def test_names_survive_both_ways(kind):
    state = generator_of(kind).state_dict()
    published = to_published(state)
    back = to_ours(published)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    blocks = "blocks" if kind == "maskgen_vq" else "decoder_blocks"
    # The last text modulation is (scale, shift) in the file, (shift, scale) in ours; the others keep their order.
    last, first = f"{blocks}.2.norm1_context.linear.bias", f"{blocks}.0.norm1_context.linear.bias"
    assert torch.equal(published[last][:32], state["layers.2.text.modulation.linear.bias"][32:])
    assert torch.equal(published[first], state["layers.0.text.modulation.linear.bias"])
    assert torch.equal(
        published[f"{blocks}.1.attn.add_k_proj.weight"], state["layers.1.text.attention.wqkv.weight"][32:64]
    )


def test_what_is_no_maskgen_is_refused(tmp_path):
    published = to_published(generator_of("maskgen_vq").state_dict())
    assert published["embeddings.weight"].shape == (21 + SPARE_ROWS, 32)
    with pytest.raises(UserError, match="must be tied"):
        to_ours(published | {"lm_head.weight": published["lm_head.weight"] + 1})
    with pytest.raises(UserError, match="neither the tables of the VQ nor of the KL"):
        to_ours({name: value for name, value in published.items() if name != "pos_embed"})
    with pytest.raises(UserError, match=r"add_k_proj of blocks\.1"):
        to_ours({name: value for name, value in published.items() if name != "blocks.1.attn.add_k_proj.bias"})
    torch.save({**published, "blocks.7.spare": torch.zeros(1)}, tmp_path / "more.bin")
    with pytest.raises(UserError, match="does not fit the configured network"):
        load_maskgen(generator_of("maskgen_vq"), tmp_path / "more.bin")


@pytest.fixture
def presets(tmp_path, monkeypatch):
    """The published presets with small sizes; the schedules stay."""
    folder = tmp_path / "configs"
    (folder / "generator").mkdir(parents=True)
    for kind in KINDS:
        config = importer.generator_preset(f"{kind}_l") | SIZES
        config["condition"] = {**config["condition"], **TEXT}
        (folder / "generator" / f"{kind}_l.yaml").write_text(yaml.safe_dump(config))
    (folder / "schedule").symlink_to(importer.CONFIGS / "schedule")
    monkeypatch.setattr(importer, "CONFIGS", folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_file_becomes_a_release_that_samples_from_texts(kind, presets, tmp_path):
    options = TOKENS | KINDS[kind]
    torch.manual_seed(1)
    tokenizer = save_release(tmp_path / "tokenizer", build(options), options, kind="tokenizer")
    generator = generator_of(kind)
    torch.save(to_published(generator.state_dict()), tmp_path / "file.bin")
    importer.main(
        [
            *("--tokenizer", str(tokenizer), "--generator", str(tmp_path / "file.bin"), "--family", kind),
            *("--size", f"{kind}_l", "--schedule", '{"steps": 3}', "--out", str(tmp_path / "out")),
        ]
    )
    with pytest.raises(UserError, match="text encoders are not part of vgen; give text_features"):
        load_pipeline(tmp_path / "out", device=torch.device("cpu"))
    texts = captions(2, decoder=(4, 7))
    path = tmp_path / "texts.safetensors"
    tensors = {"features": texts.features, "pooled": texts.pooled}
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"must hold decoder_features \[captions \+ 1, 4, width\]"):
        load_pipeline(tmp_path / "out", device=torch.device("cpu"), text_features=path)
    save_file(tensors | {"decoder_features": texts.decoder_features}, path)
    pipeline = load_pipeline(tmp_path / "out", device=torch.device("cpu"), text_features=path)
    steps = 3 if kind == "maskgen_kl" else None
    sampling = Sampling(seed=1, guidance=Guidance(scale=2.0), diffusion_steps=steps)
    labels, index = torch.tensor([0, 1, 2]), torch.arange(3)
    pictures = pipeline.generate(labels, index, sampling)
    assert pictures.shape == (3, 3, 16, 16)
    # The decoder is told of the text, too.
    tokens = pipeline.generate_ids(labels, index, sampling)
    latents, told = pipeline.for_tokenizer(tokens, labels)
    assert torch.equal(told, texts.decoder_features)
    if kind == "maskgen_kl":
        torch.testing.assert_close(latents * 0.7525, tokens)
    with torch.inference_mode():
        silent = pipeline.tokenizer.decode(latents)
        assert not torch.allclose(pipeline.tokenizer.decode(latents, told), silent)
    generator.condition.attach(texts)
    known = tokens if kind == "maskgen_vq" else torch.randn(3, 6, 4)
    with torch.inference_mode():
        forced = generator.logits(known, labels, pipeline.plan)
        torch.testing.assert_close(pipeline.generator.logits(known, labels, pipeline.plan), forced)


def test_a_file_of_captions_is_checked(tmp_path):
    from vgen.checkpoints.text_features import read_captions

    path = tmp_path / "texts.safetensors"
    save_file({"features": torch.zeros(3, 2, 4)}, path)
    with pytest.raises(UserError, match=r"must hold tensors named features and pooled.*found features"):
        read_captions(path)
    save_file({"features": torch.zeros(3, 2, 4), "pooled": torch.zeros(2, 4)}, path)
    with pytest.raises(UserError, match=r"texts\.safetensors: captions: pooled of shape \[2, 4\]"):
        read_captions(path)
