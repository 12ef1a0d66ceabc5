import pytest
import torch

from vgen.errors import UserError
from vgen.losses.perceptual import LPIPS, load_lpips


@pytest.fixture
def lpips():
    torch.manual_seed(0)
    model = LPIPS()
    for parameter in model.parameters():
        if parameter.dim() == 4 and parameter.shape[0] == 1:
            parameter.data.abs_()
    return model


@pytest.fixture
def folder(lpips, tmp_path, monkeypatch):
    """A folder with a torchvision-like trunk and a head file; the usual places are empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("VGEN_WEIGHTS", raising=False)
    monkeypatch.setattr("vgen.losses.perceptual._bundled_heads", list)
    folder = tmp_path / "weights"
    folder.mkdir()
    state = lpips.state_dict()
    trunk = {f"features.{k.split('.', 2)[2]}": v for k, v in state.items() if k.startswith("net.")}
    torch.save(trunk | {"classifier.6.bias": torch.zeros(1000)}, folder / "vgg16-397923af.pth")
    torch.save({k: v for k, v in state.items() if k.startswith("lin")}, folder / "vgg.pth")
    return folder


def pair():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 2, 3, 32, 32, generator=generator) * 2 - 1


def test_distance(lpips):
    a, b = pair()
    assert lpips(a, b).shape == (2,)
    assert (lpips(a, b) > 0).all()
    assert not lpips(a, a).any()
    assert torch.allclose(lpips(a, b), lpips(b, a))


def test_is_frozen_and_stays_in_evaluation_mode(lpips):
    container = torch.nn.Sequential(lpips).train()
    assert not any(module.training for module in container[0].modules())
    assert not any(p.requires_grad for p in lpips.parameters())


def test_gradient_is_finite_where_features_vanish(lpips):
    black = torch.zeros(1, 3, 32, 32, requires_grad=True)
    for parameter in lpips.net.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(-1e3)
    lpips(pair()[0][:1], black).sum().backward()
    assert black.grad.isfinite().all()


def test_autocast_keeps_the_result_in_float32(lpips):
    a, b = pair()
    with torch.autocast("cpu", torch.bfloat16):
        value = lpips(a, b)
    assert value.dtype == torch.float32
    assert torch.allclose(value, lpips(a, b), rtol=0.05)


@pytest.mark.parametrize("how", ["folder", "file", "environment", "cache"])
def test_weights_are_found(lpips, folder, tmp_path, monkeypatch, how):
    weights = None
    if how == "folder":
        weights = folder
    elif how == "file":
        weights = folder / "vgg16-397923af.pth"
    elif how == "environment":
        monkeypatch.setenv("VGEN_WEIGHTS", f"{tmp_path / 'nothing'}:{folder}")
    else:
        (tmp_path / "torch" / "hub").mkdir(parents=True)
        (folder / "vgg.pth").rename(folder / "weights-vgg16-lpips.pth")
        folder.rename(tmp_path / "torch" / "hub" / "checkpoints")
    found = load_lpips(weights)
    a, b = pair()
    assert torch.equal(found(a, b), lpips(a, b))


def test_missing_weights_name_files_places_and_the_way_out(folder, tmp_path):
    (folder / "vgg16-397923af.pth").unlink()
    with pytest.raises(UserError) as error:
        load_lpips(folder)
    message = str(error.value)
    for part in ("perceptual=lpips", "perceptual=none", "VGEN_WEIGHTS", str(folder / "vgg16-397923af.pth")):
        assert part in message
    assert str(tmp_path / "torch" / "hub" / "checkpoints" / "vgg16-397923af.pth") in message
    assert "\n" not in message


def test_missing_heads(folder):
    (folder / "vgg.pth").unlink()
    with pytest.raises(UserError, match=r"weights-vgg16-lpips\.pth"):
        load_lpips(folder)


def test_damaged_and_foreign_weights(folder):
    path = folder / "vgg16-397923af.pth"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(UserError, match="truncated"):
        load_lpips(folder)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(UserError, match="do not fit"):
        load_lpips(folder)
    trunk = {f"features.{k.split('.', 2)[2]}": v for k, v in LPIPS().state_dict().items() if k.startswith("net.")}
    torch.save(trunk | {"features.99.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"99\.weight"):
        load_lpips(folder)


def test_torchmetrics_ships_the_heads():
    from vgen.losses.perceptual import HEAD_FILES, _bundled_heads
    from vgen.losses.weight_files import find_weights, read_weight_file

    heads = read_weight_file(find_weights(_bundled_heads(), HEAD_FILES, "lpips"), "lpips")
    assert {k: tuple(v.shape) for k, v in heads.items()} == {
        f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate((64, 128, 256, 512, 512))
    }
    assert all((value >= 0).all() for value in heads.values())
