import math

import pytest
import torch
from torch import nn

from vgen.errors import UserError
from vgen.losses.adversarial import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    PatchGAN,
    StyleGANDiscriminator,
    adaptive_weight,
    frozen,
)


def test_patchgan_has_the_published_size():
    assert sum(p.numel() for p in PatchGAN().parameters()) == 2_765_633


@pytest.mark.parametrize(("layers", "side", "expected"), [(3, 24, 1), (3, 32, 2), (2, 16, 2), (1, 6, 1)])
def test_patchgan_judges_patches(layers, side, expected):
    logits = PatchGAN(base_channels=4, num_layers=layers)(torch.rand(2, 3, side, side))
    assert logits.shape == (2, 1, expected, expected)


def test_group_norm_does_not_mix_images():
    torch.manual_seed(0)
    model = PatchGAN(base_channels=4, num_layers=2, norm="group")
    pixels = torch.rand(3, 3, 16, 20)
    assert torch.allclose(model(pixels)[1:2], model(pixels[1:2]), atol=1e-6)
    mixing = PatchGAN(base_channels=4, num_layers=2)
    assert not torch.allclose(mixing(pixels)[1:2], mixing(pixels[1:2]), atol=1e-3)


@pytest.mark.parametrize("size", [8, 32])
def test_stylegan_discriminator_gives_one_logit(size):
    model = StyleGANDiscriminator(image_size=size, max_channels=8)
    assert model(torch.rand(2, 3, size, size)).shape == (2, 1)
    with pytest.raises(UserError, match=f"image_size={size}"):
        model(torch.rand(2, 3, size, size * 2))


def test_stylegan_widths():
    with torch.device("meta"):
        model = StyleGANDiscriminator(image_size=256)
    assert [block.conv_res.weight.shape[0] for block in model.blocks[2:]] == [128, 256, 512, 512, 512, 512]
    assert model.blocks[0].weight.shape[0] == 64


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PatchGAN(norm="instance"), "norm=instance"),
        (lambda: PatchGAN(num_layers=0), "num_layers"),
        (lambda: PatchGAN(num_layers=3)(torch.zeros(1, 3, 16, 32)), "too small"),
        (lambda: StyleGANDiscriminator(image_size=48), "power of two"),
        (lambda: StyleGANDiscriminator(image_size=32, max_channels=0), "max_channels=0"),
    ],
)
def test_bad_options(build, message):
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize("name", ["hinge", "vanilla", "non-saturating"])
def test_discriminator_losses_push_real_up_and_fake_down(name):
    real, fake = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    DISCRIMINATOR_LOSSES[name](real.clamp(-0.9, 0.9), fake.clamp(-0.9, 0.9)).backward()
    assert (real.grad <= 0).all()
    assert (fake.grad >= 0).all()
    assert real.grad.any()
    assert fake.grad.any()


def test_non_saturating_is_cross_entropy_and_the_reference_is_not():
    fake = torch.tensor([-30.0, 0.0, 2.0], requires_grad=True)
    bce = nn.functional.binary_cross_entropy_with_logits(fake, torch.ones(3))
    assert torch.allclose(GENERATOR_LOSSES["non-saturating"](fake), bce)
    assert GENERATOR_LOSSES["non-saturating-reference"](fake).item() == pytest.approx(math.log(1 + math.e) + 28 / 3)
    (grad,) = torch.autograd.grad(DISCRIMINATOR_LOSSES["non-saturating-reference"](fake.detach(), fake), fake)
    assert not grad.any()


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    ratio = adaptive_weight((weight * torch.tensor([3.0, 4.0])).sum(), 2 * weight[0], weight)
    assert ratio.item() == pytest.approx(5 / 2.0001)
    assert not ratio.requires_grad
    assert adaptive_weight((1e9 * weight).sum(), 0 * weight.sum(), weight) == 1e4


def test_frozen_leaves_no_gradient_but_lets_it_through():
    model = PatchGAN(base_channels=4, num_layers=1)
    model.main[0].bias.requires_grad_(False)
    pixels = torch.rand(2, 3, 8, 8, requires_grad=True)
    with frozen(model):
        logits = model(pixels)
    logits.sum().backward()
    assert pixels.grad.any()
    assert all(p.grad is None for p in model.parameters())
    assert model.main[0].weight.requires_grad
    assert not model.main[0].bias.requires_grad
