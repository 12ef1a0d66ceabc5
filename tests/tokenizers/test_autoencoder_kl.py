import pytest
import torch

from vgen.errors import UserError
from vgen.tokenizers.autoencoder_kl import AutoencoderKL, Posterior

TINY = {"image_size": 8, "latent_channels": 3, "block_channels": [8, 16], "layers_per_block": 1, "norm_groups": 4}


def tiny(**options):
    torch.manual_seed(0)
    return AutoencoderKL(**(TINY | options)).eval()


def test_shapes_and_scale():
    vae, pixels = tiny(scaling_factor=0.5), torch.rand(2, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        latents, posterior = vae.encode(pixels), vae.posterior(pixels)
        assert torch.equal(latents, 0.5 * posterior.mean)
        noise = torch.randn_like(latents)
        assert torch.equal(vae.encode(pixels, noise), 0.5 * posterior.sample(noise))
        assert vae.decode(latents).shape == pixels.shape
        assert torch.equal(vae.decode(latents), vae(pixels).reconstruction)


def test_it_stays_float32_under_autocast():
    vae, pixels = tiny(), torch.rand(1, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        want = vae.decode(vae.encode(pixels))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(vae.decode(vae.encode(pixels)), want)


def test_the_posterior():
    posterior = Posterior(torch.full((2, 1, 3, 3), 2.0), torch.zeros(2, 1, 3, 3))
    assert torch.allclose(posterior.kl(), torch.tensor(9 * 2.0))
    samples = posterior.sample(torch.randn(2, 1, 3, 3))
    assert (samples - 2.0).abs().max() > 0


def test_training_samples_and_weighs_the_divergence():
    vae, pixels = tiny(kl_weight=0.1).train(), torch.rand(2, 3, 8, 8) * 2 - 1
    output = vae(pixels)
    assert not torch.equal(output.reconstruction, vae(pixels).reconstruction)
    assert torch.allclose(output.losses["kl"], 0.1 * vae.posterior(pixels).kl().mean() / pixels[0].numel())
    assert output.ids.shape == (2, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 7}, "stride 2"),
        ({"latent_channels": 0}, "positive"),
        ({"block_channels": []}, "positive"),
        ({"scaling_factor": 0.0}, "scaling_factor=0.0"),
        ({"kl_weight": -1.0}, "kl_weight"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 3, 7, 8), (3, 8, 8)])
def test_bad_pixels(shape):
    with pytest.raises(UserError):
        tiny().encode(torch.zeros(shape))
