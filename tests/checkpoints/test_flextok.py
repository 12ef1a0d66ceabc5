import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tokenizers.test_flextok import VAE, tiny
from vgen.checkpoints import __main__ as importer
from vgen.checkpoints.flextok import flextok_config, load_flextok, load_published_vae, to_ours, to_published
from vgen.checkpoints.release import build, load_tokenizer, load_vae
from vgen.errors import UserError
from vgen.tokenizers.autoencoder_kl import AutoencoderKL
from vgen.tokenizers.flextok import FlexTok

RECIPE = {
    "_target_": "flextok.flextok_wrapper.FlexTok",
    "vae": {"_target_": "os.system", "scaling_factor": 0.5, "norm_num_groups": 4, "sample_posterior": True},
    "encoder": {"module_dict": {"enc_transformer": {"head_dim": 8}, "enc_seq_packer": {"mask_mode": "causal_last"}}},
    "decoder": {"module_dict": {"dec_transformer": {"head_dim": 8}, "dec_time_embedder": {"max_timestep": 1000.0}}},
    "regularizer": {"levels": [4, 3, 3], "drop_quant_p": None},
}


@pytest.fixture
def published(tmp_path):
    """A file as the authors publish it; returns its path and our network."""
    tokenizer = tiny(vae=AutoencoderKL(**VAE, scaling_factor=0.5))
    decoder = tokenizer.decoder
    decoder.time.max_time = 1000.0
    path = tmp_path / "model.safetensors"
    write(path, to_published(tokenizer.state_dict()), {name: str(value) for name, value in RECIPE.items()})
    return path, tokenizer


def write(path, state, header=None):
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata=header)


def test_names_come_back():
    state = tiny().state_dict()
    assert to_ours(to_published(state)).keys() == state.keys()


def test_a_published_file_becomes_a_release_that_decodes_alike(published, tmp_path, capsys):
    path, tokenizer = published
    importer.main(["--flextok", str(path), "--out", str(tmp_path / "release")])
    assert "release" in capsys.readouterr().out
    imported = load_tokenizer(tmp_path / "release")
    assert isinstance(imported, FlexTok)
    assert imported.vae.scaling_factor == 0.5
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    ids = tokenizer.encode(pixels)
    assert torch.equal(imported.encode(pixels), ids)
    decoding = tokenizer.decoding
    assert torch.equal(imported.decode(ids[:, :3], decoding=decoding), tokenizer.decode(ids[:, :3], decoding=decoding))


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_other_forms_of_the_recipe(published, form):
    path, tokenizer = published
    want = flextok_config(path)
    state, header = to_published(tokenizer.state_dict()), None
    if form == "yaml":
        header = {name: json.dumps(value).replace("null", "None") for name, value in RECIPE.items()}
    else:
        (path.parent / "config.json").write_text(json.dumps(RECIPE))
    write(path, state, header)
    assert flextok_config(path) == want


def test_nothing_of_the_recipe_is_run(published):
    config = flextok_config(published[0])
    assert "os.system" not in json.dumps(config)
    assert build(config).decoder.time.max_time == 1000.0


def test_projectors_are_reported_and_fixed_tables_may_be_missing(published):
    path, tokenizer = published
    state = load_file(path)
    state["decoder.module_dict.dec_repa_proj.0.weight"] = torch.zeros(3)
    tables = [name for name in state if name.endswith("posemb_module.posembs") and "registers" not in name]
    write(path, {name: value for name, value in state.items() if name not in tables})
    assert len(tables) == 2
    fresh = tiny(num_tokens=6)
    with pytest.warns(UserWarning, match="REPA projector"):
        load_flextok(fresh, path)
    assert all(torch.equal(value, tokenizer.state_dict()[name]) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_loading_is_strict_both_ways(published, change):
    path = published[0]
    state = load_file(path)
    name = "decoder.module_dict.dec_nested_dropout.dropout_mask_token"
    if change == "missing":
        del state[name]
    elif change == "unknown":
        state["decoder.module_dict.dec_extra.weight"] = torch.zeros(1)
    else:
        state[name] = torch.zeros(3)
    write(path, state)
    with pytest.raises(UserError, match=r"mask_token|dec_extra"):
        load_flextok(tiny(), path)


def test_damaged_and_foreign_files(tmp_path, published, capsys):
    path = published[0]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        flextok_config(path)
    write(path, {"weight": torch.zeros(1)})
    with pytest.raises(UserError, match="no FlexTok"):
        flextok_config(path)
    with pytest.raises(SystemExit):
        importer.main(["--flextok", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert "no weight file" in capsys.readouterr().err


def test_a_published_vae_becomes_a_release(tmp_path, capsys):
    vae = AutoencoderKL(**VAE, scaling_factor=0.25).eval()
    old = {name.replace("to_out.0", "proj_attn").replace("to_q", "query"): v for name, v in vae.state_dict().items()}
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    write(path, old)
    (tmp_path / "config.json").write_text(json.dumps({"scaling_factor": 0.25, "norm_num_groups": 4}))
    importer.main(["--vae", str(path), "--image-size", "8", "--out", str(tmp_path / "release")])
    imported, config = load_vae(tmp_path / "release")
    assert config["scaling_factor"] == 0.25
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.equal(imported.encode(pixels), vae.encode(pixels))
    with pytest.raises(UserError, match="release of a vae, a tokenizer"):
        load_tokenizer(tmp_path / "release")
    write(path, {name: value for name, value in old.items() if "conv_in" not in name})
    with pytest.raises(UserError, match="missing"):
        load_published_vae(vae, path)
