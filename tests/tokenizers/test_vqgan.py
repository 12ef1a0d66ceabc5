from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf

from vgen.errors import UserError
from vgen.tokenizers.vqgan import VQGAN

CONFIGS = Path(__file__).parents[2] / "configs" / "tokenizer"
TINY = {
    "image_size": 16,
    "base_channels": 8,
    "encoder_multipliers": [1, 2],
    "decoder_multipliers": [1, 2],
    "num_res_blocks": 1,
    "z_channels": 12,
    "codebook_size": 32,
    "codebook_dim": 4,
    "usage_window": 256,
}


def tiny(**options):
    torch.manual_seed(0)
    return VQGAN(**(TINY | options))


@pytest.mark.parametrize(
    ("name", "parameters", "grid"),
    [
        ("vq16", 71_883_403, (16, 16)),
        ("vq8", 70_109_835, (32, 32)),
        ("vq_32", None, (8, 8)),
        ("vq_digits", None, (4, 4)),
    ],
)
def test_presets(name, parameters, grid):
    with torch.device("meta"):
        model = instantiate(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    assert model.grid == grid
    assert model.num_tokens == grid[0] * grid[1]
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert sum(p.numel() for p in model.encoder.parameters()) == {"vq16": 29_298_176, "vq8": 28_559_232}[name]
        assert sum(p.numel() for p in model.decoder.parameters()) == {"vq16": 42_449_795, "vq8": 41_415_171}[name]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (6, 10), (30, 4)])
def test_any_size_that_divides_by_the_stride(height, width):
    model = tiny().eval()
    pixels = torch.rand(2, 3, height, width) * 2 - 1
    with torch.no_grad():
        ids = model.encode(pixels)
        out = model(pixels)
        picture = model.decode(ids, grid=(height // 2, width // 2))
    assert ids.dtype == torch.int64
    assert ids.shape == (2, height * width // 4)
    assert torch.equal(out.ids, ids)
    assert picture.shape == pixels.shape
    assert torch.allclose(out.reconstruction, picture, atol=1e-5)


def test_ids_are_in_raster_order():
    model = tiny().eval()
    with torch.no_grad():
        latents = model.latents(torch.rand(1, 3, 8, 12) * 2 - 1)
        ids = model.quantize(latents).ids
        one = model.quantize(latents[:, :, 2:3, 4:5]).ids
    assert ids[0, 2 * 6 + 4] == one[0, 0]


def test_images_of_a_batch_do_not_influence_each_other():
    model = tiny().eval()
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(model.encode(pixels), torch.cat([model.encode(p[None]) for p in pixels]))


@pytest.mark.parametrize("channels", [5, 12, 33])
def test_group_norm_adapts_to_any_width(channels):
    model = tiny(base_channels=channels, z_channels=7)
    assert model(torch.zeros(1, 3, 16, 16)).reconstruction.isfinite().all()


def test_gradient_reaches_every_parameter():
    model = tiny(entropy_weight=0.1)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    out = model(pixels)
    (F.mse_loss(out.reconstruction, pixels) + sum(out.losses.values())).backward()
    # A constant added to all keys moves every score alike, so only the biases of the keys get no gradient.
    still = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]
    assert [name for name in still if not name.endswith(".k.bias")] == []
    assert model.last_layer.grad is not None
    assert model.last_layer.shape == (3, 8, 3, 3)


def test_gradient_checkpointing_changes_nothing_but_memory():
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    grads = []
    for flag in (False, True):
        model = tiny(gradient_checkpointing=flag)
        out = model(pixels)
        (out.reconstruction.square().mean() + sum(out.losses.values())).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


def test_bfloat16_autocast_trains_in_float32_where_it_matters():
    model = tiny()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        out = model(pixels)
        ids = model.eval().encode(pixels)
    assert out.reconstruction.dtype == torch.float32
    assert {value.dtype for value in out.losses.values()} == {torch.float32}
    assert torch.equal(out.ids, ids)
    sum(out.losses.values()).backward()
    assert model.quantize.embedding.weight.grad.isfinite().all()


def test_a_bfloat16_copy_encodes_and_decodes():
    model = tiny().bfloat16().eval()
    with torch.no_grad():
        ids = model.encode(torch.rand(1, 3, 16, 16))
        assert model.decode(ids).dtype == torch.float32


def test_statistics():
    model = tiny()
    figures = model.statistics(model(torch.rand(2, 3, 16, 16)).ids)
    assert set(figures) == {"perplexity", "codebook_usage"}
    assert 1 <= figures["perplexity"] <= 32
    assert 0 < figures["codebook_usage"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 15}, "image_size=15"),
        ({"image_size": 0}, "image_size=0"),
        ({"encoder_multipliers": []}, "encoder_multipliers"),
        ({"decoder_multipliers": [1, 2, 2]}, "equally long"),
        ({"encoder_multipliers": [1, 0]}, "positive integers"),
        ({"base_channels": 0}, "base_channels=0"),
        ({"num_res_blocks": 0}, "num_res_blocks=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"codebook_size": 0}, "codebook_size=0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)


def test_bad_input():
    model = tiny()
    with pytest.raises(UserError, match="15 x 16"):
        model.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(UserError, match="3, H, W"):
        model.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(UserError, match="grid of 8 x 8"):
        model.decode(torch.zeros(1, 63, dtype=torch.int64))


def test_memorises_eight_images():
    """120 steps bring the reconstruction error of eight images of random blocks to a fiftieth, through real ids."""
    model = tiny(image_size=8)
    pixels = F.interpolate(torch.rand(8, 3, 2, 2) * 2 - 1, scale_factor=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    errors = []
    for _ in range(120):
        out = model(pixels)
        errors.append(F.mse_loss(out.reconstruction, pixels))
        optimizer.zero_grad()
        (errors[-1] + sum(out.losses.values())).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        final = F.mse_loss(model.decode(model.encode(pixels)), pixels)
    assert final < errors[0] / 50


@pytest.mark.slow
def test_compiled_training_gives_the_same_gradients_and_compiles_once_per_network(traced_only):
    from torch._dynamo.utils import counters

    from vgen.losses.adversarial import adaptive_weight

    torch._dynamo.reset()
    counters.clear()
    results = []
    for compiled in (False, True):
        tokenizer = tiny().train()
        names = list(tokenizer.state_dict())
        if compiled:
            tokenizer.compile_parts()
        pixels = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)
        for _ in range(2):
            tokenizer.zero_grad()
            output = tokenizer(pixels)
            first, second = output.reconstruction.abs().mean(), output.reconstruction.square().mean()
            weight = adaptive_weight(first, second, tokenizer.last_layer)
            (first + weight * second + sum(output.losses.values())).backward()
        with torch.no_grad():
            tokenizer.eval()(pixels[:1])
        assert list(tokenizer.state_dict()) == names
        results.append([parameter.grad.clone() for parameter in tokenizer.parameters()])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, atol=1e-5, rtol=1e-3)
    assert counters["stats"]["unique_graphs"] == 2
