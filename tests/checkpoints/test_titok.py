import json

import pytest
import torch
import yaml

from vgen.checkpoints import titok as importer
from vgen.checkpoints.release import build, load_tokenizer
from vgen.checkpoints.titok import import_titok, options_from_config, to_published
from vgen.errors import UserError

VIT = {"width": 16, "layers": 1, "heads": 2}
PIXELS = {"base_channels": 8, "multipliers": [1, 1], "num_res_blocks": 1, "z_channels": 6, "norm_groups": 4}
VQGAN = {
    "_target_": "vgen.tokenizers.maskgit_vqgan.MaskGITVQGAN",
    "image_size": 8,
    "codebook_size": 12,
    "usage_window": 64,
    **PIXELS,
}
TITOK = {
    "_target_": "vgen.tokenizers.titok.TiTok",
    "image_size": 8,
    "patch_size": 2,
    "num_latent_tokens": 5,
    "token_size": 4,
    "encoder": VIT,
    "decoder": VIT,
    "codebook_size": 32,
    "l2_normalize": True,
    "bottleneck": "vq",
    "latent_layout": "legacy",
    "head": "proxy",
    "proxy_codebook_size": 12,
    "pixel_decoder": {"_target_": "vgen.tokenizers.maskgit_vqgan.MaskGITDecoder", **PIXELS},
    "usage_window": 64,
}
SINGLE = {**TITOK, "latent_layout": "per_token", "head": "pixel", "proxy_codebook_size": None, "pixel_decoder": None}


@pytest.fixture
def presets(tmp_path, monkeypatch):
    """Presets small enough for a test, in the place of the real ones."""
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, content in (("titok_l32", TITOK), ("titok_bl64_vq", SINGLE), ("maskgit_vqgan", VQGAN)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(importer, "CONFIGS", folder)


def publish(path, options):
    """A file as the authors publish it, with random weights; returns our network."""
    torch.manual_seed(0)
    network = build(options).eval()
    torch.save(to_published(network.state_dict()), path)
    return network


@pytest.mark.parametrize(("preset", "options"), [("titok_l32", TITOK), ("titok_bl64_vq", SINGLE)])
def test_a_published_file_becomes_a_release_that_decodes_alike(preset, options, presets, tmp_path, capsys):
    network = publish(tmp_path / "weights.bin", options)
    assert not any("codebook_used" in name for name in torch.load(tmp_path / "weights.bin", weights_only=True))
    importer.main([str(tmp_path / "weights.bin"), "--preset", preset, "--out", str(tmp_path / "out")])
    assert str(tmp_path / "out") in capsys.readouterr().out
    ids = torch.randint(32, (2, 5))
    assert torch.equal(load_tokenizer(tmp_path / "out").decode(ids), network.decode(ids))


def test_maskgit_vqgan_is_imported_too(presets, tmp_path):
    network = publish(tmp_path / "vqgan.bin", VQGAN)
    import_titok(tmp_path / "vqgan.bin", tmp_path / "out", preset="maskgit_vqgan")
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    assert torch.equal(load_tokenizer(tmp_path / "out").encode(pixels), network.encode(pixels))


def test_a_first_stage_file_is_completed_by_its_teacher(presets, tmp_path):
    first = publish(tmp_path / "first.bin", {**TITOK, "pixel_decoder": None})
    teacher = publish(tmp_path / "vqgan.bin", VQGAN)
    with pytest.raises(UserError, match="missing: pixel_"):
        import_titok(tmp_path / "first.bin", tmp_path / "out", preset="titok_l32")
    import_titok(tmp_path / "first.bin", tmp_path / "out", preset="titok_l32", proxy=tmp_path / "vqgan.bin")
    whole = load_tokenizer(tmp_path / "out")
    assert torch.equal(whole.pixel_quantize.embedding.weight, teacher.codebook)
    assert torch.equal(whole.latent_tokens, first.latent_tokens)


def test_training_files_of_a_clustering_codebook_load_with_and_without_it(presets, tmp_path):
    network = publish(tmp_path / "weights.bin", {**SINGLE, "bottleneck": "clustering_vq"})
    assert "quantize.embed_prob" in torch.load(tmp_path / "weights.bin", weights_only=True)
    import_titok(tmp_path / "weights.bin", tmp_path / "out", preset="titok_bl64_vq")
    assert torch.equal(load_tokenizer(tmp_path / "out").codebook, network.codebook)


def published_config(**changes):
    model = {
        "codebook_size": 4096,
        "token_size": 12,
        "use_l2_norm": True,
        "commitment_cost": 0.25,
        "vit_enc_model_size": "large",
        "vit_dec_model_size": "large",
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": 32,
    }
    return {"model": {"vq_model": model | changes}, "dataset": {"preprocessing": {"crop_size": 256}}}


def test_a_published_configuration_without_flags_is_a_fine_tuned_legacy_model():
    options = options_from_config(published_config())
    preset = yaml.safe_load((importer.CONFIGS / "titok_l32.yaml").read_text())
    for key, value in options.items():
        assert preset[key] == value or key == "decoder_patch_size", key
    assert "pixel_decoder" not in options_from_config(published_config(finetune_decoder=False))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("titok_bl64_vq", {"codebook_size": 8192, "token_size": 64, "use_l2_norm": False, "num_latent_tokens": 64}),
        ("titok_bl64_vae", {"quantize_mode": "vae", "token_size": 16, "use_l2_norm": False, "num_latent_tokens": 64}),
        (
            "tatitok_bl32_vae",
            {"quantize_mode": "vae", "token_size": 16, "use_l2_norm": False, "text_context_length": 77}
            | {"text_embed_dim": 768},
        ),
    ],
)
def test_newer_configurations_give_their_presets(name, changes):
    flags = {"is_legacy": False, "finetune_decoder": False, "vit_enc_model_size": "base"}
    options = options_from_config(published_config(**flags, **changes))
    preset = yaml.safe_load((importer.CONFIGS / f"{name}.yaml").read_text())
    for key, value in options.items():
        assert preset[key] == value or key == "decoder_patch_size", key


def test_mistakes_are_named(presets, tmp_path, capsys):
    publish(tmp_path / "weights.bin", SINGLE)
    with pytest.raises(UserError, match="head=proxy instead of pixel"):
        import_titok(tmp_path / "weights.bin", tmp_path / "out", preset="titok_l32")
    with pytest.raises(UserError, match="either --preset or --config"):
        import_titok(tmp_path / "weights.bin", tmp_path / "out")
    with pytest.raises(UserError, match="choose one of maskgit_vqgan, titok_bl64_vq, titok_l32"):
        import_titok(tmp_path / "weights.bin", tmp_path / "out", preset="titok_x")
    (tmp_path / "config.json").write_text(json.dumps(published_config(vit_enc_model_size="huge")))
    with pytest.raises(UserError, match="huge"):
        import_titok(tmp_path / "weights.bin", tmp_path / "out", config=tmp_path / "config.json")
    with pytest.raises(SystemExit) as stop:
        importer.main([str(tmp_path / "absent.bin"), "--preset", "titok_l32", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "no weight file" in capsys.readouterr().err
