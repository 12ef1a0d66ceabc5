import pytest
import torch
from torch import nn

from vgen.errors import UserError
from vgen.losses.blur_discriminator import BlurDiscriminator, BlurDownsample, LeCam
from vgen.losses.classifier_distance import ClassifierDistance, load_convnext
from vgen.losses.vq import VQLoss


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 10), (1, 3)])
def test_blur_halves_and_keeps_constants_inside(height, width):
    out = BlurDownsample()(torch.ones(1, 2, height, width))
    assert out.shape == (1, 2, -(-height // 2), -(-width // 2))
    inside = out[:, :, 1:-1, 1:-1]
    assert torch.allclose(inside, torch.ones_like(inside))


@pytest.mark.parametrize("size", [16, 32, 40])
def test_discriminator_judges_a_fixed_map(size):
    assert BlurDiscriminator(base_channels=32, num_stages=2)(torch.rand(2, 3, size, size)).shape == (2, 1, 16, 16)


def test_discriminator_refuses_odd_widths():
    with pytest.raises(UserError, match="multiple of 32"):
        BlurDiscriminator(base_channels=20)


def test_lecam_uses_the_running_means_before_updating_them():
    lecam = LeCam(decay=0.5)
    real, fake = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([-1.0])
    assert lecam(real, fake).item() == pytest.approx(2.0**2 + 1.0**2)
    assert lecam.ema_real.item() == pytest.approx(1.0)
    assert lecam.ema_fake.item() == pytest.approx(-0.5)
    assert lecam(real, fake).item() == pytest.approx(2.5**2 + 2.0**2)
    assert not lecam.ema_real.requires_grad


def test_unit_range_is_a_quarter_of_l2():
    a, b = torch.rand(2, 3, 4, 4) * 2 - 1, torch.rand(2, 3, 4, 4) * 2 - 1
    totals = [
        VQLoss(perceptual="none", adversarial_weight=0.0, reconstruction_range=name).generator_loss(a, b, {}, step=1)[0]
        for name in ("signed", "unit")
    ]
    assert torch.allclose(totals[0], 4 * totals[1])


def test_weights_of_the_quantizer_and_of_the_discriminator():
    loss = VQLoss(
        perceptual="none",
        adversarial_weight=0.1,
        discriminator_weight=2.0,
        adversarial_start=1,
        lecam_weight=0.5,
        quantizer_weight=0.0,
    )
    a, b = torch.rand(2, 3, 16, 16) * 2 - 1, torch.rand(2, 3, 16, 16) * 2 - 1
    discriminator = BlurDiscriminator(base_channels=32, num_stages=1)
    total, logs = loss.generator_loss(a, b, {"vq": torch.tensor(7.0)}, step=1, discriminator=discriminator)
    assert torch.allclose(total, logs["reconstruction"] + 0.1 * logs["generator"])
    total, logs = loss.discriminator_loss(a, b, step=1, discriminator=discriminator)
    assert torch.allclose(total, 2.0 * logs["discriminator"] + 0.5 * logs["lecam"])


@pytest.mark.parametrize(
    ("option", "value"),
    [("reconstruction_range", "byte"), ("lecam_weight", -1.0), ("quantizer_weight", -1.0), ("convnext_weight", -0.1)],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(UserError, match=option):
        VQLoss(perceptual="none", **{option: value})


def test_classifier_distance_is_frozen_and_zero_for_equal_images():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5))
    distance = ClassifierDistance(network).train()
    pixels = (torch.rand(2, 3, 20, 30) * 2 - 1).requires_grad_()
    assert not distance.training
    assert not any(p.requires_grad for p in distance.parameters())
    assert distance(pixels, pixels).item() == 0.0
    distance(pixels, torch.zeros_like(pixels)).backward()
    assert pixels.grad.any()


def test_missing_convnext_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("VGEN_WEIGHTS", raising=False)
    with pytest.raises(UserError, match=r"convnext_small-0c510722\.pth.*perceptual=none"):
        VQLoss(perceptual="convnext")
    (tmp_path / "convnext_small-0c510722.pth").write_bytes(b"half")
    with pytest.raises(UserError, match="truncated"):
        load_convnext(tmp_path)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not fit"):
        load_convnext(tmp_path / "other.pth")
