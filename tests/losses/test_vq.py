import pytest
import torch
from torch import nn

from vgen.errors import UserError
from vgen.losses.adversarial import PatchGAN
from vgen.losses.vq import VQLoss

PLAIN = {"perceptual": "none", "adversarial_start": 10}


@pytest.fixture
def scene():
    torch.manual_seed(0)
    last = nn.Parameter(torch.randn(3, 4, 3, 3))
    recon = nn.functional.conv2d(torch.rand(2, 4, 16, 16), last, padding=1)
    return torch.rand(2, 3, 16, 16), recon, last, PatchGAN(base_channels=4, num_layers=2)


def test_total_is_the_weighted_sum(scene):
    pixels, recon, _, discriminator = scene
    loss = VQLoss(**PLAIN, reconstruction="l1", reconstruction_weight=2.0, adversarial_weight=0.3)
    quantizer = {"vq": torch.tensor(0.5), "commit": torch.tensor(0.25)}
    total, logs = loss.generator_loss(pixels, recon, quantizer, step=10, discriminator=discriminator)
    expected = 2 * (pixels - recon).abs().mean() + 0.3 * logs["generator"] + 0.75
    assert torch.allclose(total, expected)
    assert set(logs) == {"reconstruction", "generator", "vq", "commit", "total"}
    assert not any(value.requires_grad for value in logs.values())


def test_warm_up_start(scene):
    pixels, recon, _, discriminator = scene
    loss = VQLoss(**PLAIN)
    assert not loss.active(9)
    assert loss.active(10)
    _, before = loss.generator_loss(pixels, recon, {}, step=9, discriminator=discriminator)
    assert "generator" not in before
    assert loss.discriminator_loss(pixels, recon, step=9, discriminator=discriminator)[0] == 0
    assert loss.discriminator_loss(pixels, recon, step=10, discriminator=discriminator)[0] > 0


def test_gradients_stay_on_their_own_side(scene):
    pixels, recon, last, discriminator = scene
    loss = VQLoss(**PLAIN, adaptive=True)
    total, logs = loss.generator_loss(pixels, recon, {}, step=10, discriminator=discriminator, last_layer=last)
    total.backward()
    assert last.grad.any()
    assert logs["adaptive_weight"] > 0
    assert all(p.grad is None for p in discriminator.parameters())
    last.grad = None
    loss.discriminator_loss(pixels, recon, step=10, discriminator=discriminator)[0].backward()
    assert last.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())


def test_without_gan_no_discriminator_is_needed(scene):
    pixels, recon, _, _ = scene
    loss = VQLoss(perceptual="none", adversarial_weight=0.0, adversarial_start=0)
    assert not loss.needs_discriminator
    total, _ = loss.generator_loss(pixels, recon, {}, step=1)
    assert torch.allclose(total, (pixels - recon).square().mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruction": "huber"}, "reconstruction=huber"),
        ({"perceptual": "vgg"}, "perceptual=vgg"),
        ({"discriminator_loss": "wasserstein"}, "discriminator_loss=wasserstein"),
        ({"generator_loss": "vanilla"}, "generator_loss=vanilla"),
        ({"adversarial_start": -1}, "adversarial_start=-1"),
        ({"perceptual_weight": -0.5}, "perceptual_weight=-0.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        VQLoss(**(PLAIN | options))


def test_missing_lpips_weights_stop_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("VGEN_WEIGHTS", raising=False)
    with pytest.raises(UserError, match="perceptual=none"):
        VQLoss()
