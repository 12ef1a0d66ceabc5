import argparse

import pytest
import torch
from safetensors.torch import save_file

from vgen.checkpoints.llamagen_vq import (
    load_llamagen_discriminator,
    load_llamagen_vq,
    load_lpips_state,
    to_published,
)
from vgen.errors import UserError
from vgen.losses.adversarial import PatchGAN
from vgen.losses.perceptual import LPIPS
from vgen.tokenizers.vqgan import VQGAN

OPTIONS = {
    "image_size": 8,
    "base_channels": 8,
    "encoder_multipliers": [1, 1],
    "decoder_multipliers": [1, 1],
    "num_res_blocks": 1,
    "z_channels": 8,
    "codebook_size": 16,
    "codebook_dim": 4,
    "usage_window": 32,
}


def build(seed, **options):
    torch.manual_seed(seed)
    return VQGAN(**(OPTIONS | options)).eval()


@pytest.fixture
def published():
    state = to_published(build(1).state_dict())
    assert state["quantize.codebook_used"].dtype == torch.float32
    return state | {"quantize.codebook_used": torch.full((65536,), 3.0)}


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("nesting", ["flat", "model", "ema", "safetensors", "training"])
def test_loads_every_published_form(published, tmp_path, nesting):
    wrong = {name: value + 1 for name, value in published.items()}
    content = {
        "flat": published,
        "model": {"model": published},
        "ema": {"model": wrong, "ema": published},
        "training": {"model": published, "optimizer": {"state": {}}, "steps": 7, "args": argparse.Namespace(lr=1e-4)},
    }
    path = tmp_path / ("vq.safetensors" if nesting == "safetensors" else "vq.pt")
    if nesting == "safetensors":
        save_file(published, path)
    else:
        torch.save(content[nesting], path)
    model = build(2)
    load_llamagen_vq(model, path)
    assert same_weights(model, build(1))
    assert not model.quantize.codebook_used.any()


def test_the_usage_queue_may_be_absent(published, tmp_path):
    del published["quantize.codebook_used"]
    torch.save(published, tmp_path / "vq.pt")
    model = build(2)
    load_llamagen_vq(model, tmp_path / "vq.pt")
    assert same_weights(model, build(1))


def test_differences_are_named_and_nothing_is_loaded(published, tmp_path):
    del published["encoder.conv_in.bias"]
    published["decoder.extra.weight"] = torch.zeros(1)
    published["quant_conv.bias"] = torch.zeros(5)
    torch.save({"model": published}, tmp_path / "vq.pt")
    model = build(2)
    with pytest.raises(UserError) as error:
        load_llamagen_vq(model, tmp_path / "vq.pt")
    for part in ("vq.pt", "encoder.conv_in.bias", "decoder.extra.weight", "quant_conv.bias [5] instead of [4]"):
        assert part in str(error.value)
    assert same_weights(model, build(2))


def test_another_architecture_and_a_truncated_file(published, tmp_path):
    path = tmp_path / "vq.pt"
    torch.save({"model": published}, path)
    with pytest.raises(UserError, match="does not fit"):
        load_llamagen_vq(build(2, encoder_multipliers=[1, 1, 1], decoder_multipliers=[1, 1, 1]), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="truncated"):
        load_llamagen_vq(build(2), path)
    with pytest.raises(UserError, match="no weight file"):
        load_llamagen_vq(build(2), tmp_path / "absent.pt")


def test_discriminator_of_a_training_checkpoint(tmp_path):
    source, target = PatchGAN(base_channels=4), PatchGAN(base_channels=4)
    torch.save({"model": {}, "discriminator": source.state_dict()}, tmp_path / "train.pt")
    load_llamagen_discriminator(target, tmp_path / "train.pt")
    assert same_weights(source, target)
    with pytest.raises(UserError, match="main"):
        load_llamagen_discriminator(PatchGAN(base_channels=4, num_layers=2), tmp_path / "train.pt")


def test_lpips_with_and_without_its_constants(tmp_path):
    source, target = LPIPS(), LPIPS()
    state = source.state_dict()
    torch.save({name: value for name, value in state.items() if "scaling" not in name}, tmp_path / "lpips.pt")
    load_lpips_state(target, tmp_path / "lpips.pt")
    assert same_weights(source, target)
    del state["lin0.model.1.weight"]
    torch.save(state, tmp_path / "lpips.pt")
    with pytest.raises(UserError, match=r"lin0\.model\.1\.weight"):
        load_lpips_state(target, tmp_path / "lpips.pt")
