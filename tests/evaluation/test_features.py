import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.evaluation.helpers import FeaturesOnly, TinyExtractor, save_script
from vgen.checkpoints.release import file_sha256
from vgen.errors import UserError
from vgen.evaluation import features
from vgen.evaluation.features import (
    inception_extractor,
    load_extractor,
    network_extractor,
    register_extractor,
    vgg16_extractor,
)
from vgen.evaluation.inception import Inception
from vgen.evaluation.weights import INCEPTION, VGG16

CPU = torch.device("cpu")
INCEPTION_FILE = INCEPTION.names[0]


def load(path, name=None, weights=None):
    return load_extractor(str(path), name=name, weights=weights, device=CPU)


def test_torchscript_with_and_without_logits(tmp_path):
    full = load(save_script(TinyExtractor(), tmp_path / "tiny.pt"))
    assert (full.name, full.dim, full.classes) == ("tiny", 12, 4)
    pictures = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    values, logits = full(pictures)
    assert values.shape == (3, 12)
    assert torch.equal(logits, TinyExtractor()(pictures)[1])
    assert [full.score_name(s) for s in ("fd", "rfd", "is")] == ["fd_tiny", "rfd_tiny", "is_tiny"]
    bare = load(save_script(FeaturesOnly(), tmp_path / "bare.pt"), name="other")
    assert (bare.name, bare.dim, bare.classes) == ("other", 12, None)
    assert len(bare.sha256) == 64


@pytest.mark.parametrize("name", ["fid", "my_fid", "inception-v3", "a b", "FID2"])
def test_reserved_or_unusable_names_are_refused(tmp_path, name):
    path = save_script(FeaturesOnly(), tmp_path / "net.pt")
    with pytest.raises(UserError, match="features_name"):
        load(path, name=name)


class Flat(nn.Module):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.float().flatten()


class Refuses(nn.Module):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")
        return pictures


def test_a_file_that_is_no_extractor_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(UserError, match="not a readable TorchScript"):
        load(tmp_path / "text.pt")
    with pytest.raises(UserError, match=r"gone\.pt is no file"):
        load(tmp_path / "gone.pt")
    with pytest.raises(UserError, match="returned something else"):
        load(save_script(Flat(), tmp_path / "flat.pt"))
    with pytest.raises(UserError, match="failed on a black"):
        load(save_script(Refuses(), tmp_path / "refuses.pt"))


def test_missing_inception_weights_name_every_place(tmp_path, monkeypatch):
    monkeypatch.setenv("VGEN_WEIGHTS", str(tmp_path / "mine"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(UserError) as caught:
        load("inception")
    message = str(caught.value)
    assert str(tmp_path / "mine" / INCEPTION_FILE) in message
    assert str(tmp_path / "torch" / "hub" / "checkpoints" / INCEPTION_FILE) in message
    assert "6726825d" in message
    assert "evaluation.weights=" in message
    assert "evaluation.features=" in message
    assert "\n" not in message
    with pytest.raises(UserError, match=r"tried: .*given\.pth\)"):
        load("inception", weights=str(tmp_path / "given.pth"))


def test_other_inception_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("VGEN_WEIGHTS", str(tmp_path))
    torch.save({}, tmp_path / INCEPTION_FILE)
    with pytest.raises(UserError, match=r"is not Inception of 2015-12-05.*expected"):
        load("inception")
    with pytest.raises(UserError, match="leave it out"):
        load("inception", name="mine")


def test_inception_from_a_checked_file(tmp_path, monkeypatch):
    torch.save(Inception(None).state_dict(), tmp_path / INCEPTION_FILE)
    monkeypatch.setattr(features, "INCEPTION", replace(INCEPTION, sha256=file_sha256(tmp_path / INCEPTION_FILE)[:8]))
    extractor = load("inception", weights=str(tmp_path))
    pictures = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    out = extractor.extract(pictures)
    widths = extractor.dim, extractor.classes, extractor.spatial_dim
    assert tuple(part.shape[1] for part in out) == widths == (2048, 1008, 2023)
    names = [extractor.score_name(s) for s in ("fd", "rfd", "sfd", "is", "kid")]
    assert names == ["fid", "rfid", "sfid", "is", "kid"]
    monkeypatch.undo()
    other = inception_extractor(extractor.file, device=CPU, allow_unverified=True, resize_mode="clean")
    assert other.score_name("fd") == f"fd_inception-unverified-{other.sha256[:8]}-clean"
    assert not other.is_inception
    assert not torch.equal(other(pictures)[0], out.pool)


class Three(nn.Module):
    """Features, logits and spatial features."""

    def forward(self, pictures):
        small = nn.functional.adaptive_avg_pool2d(pictures.float(), 2).flatten(1)
        return small, small[:, :5], small[:, :7]


def test_a_registered_network_stands_in():
    register_extractor("three-parts", Three)
    extractor = load("three-parts")
    assert (extractor.dim, extractor.classes, extractor.spatial_dim) == (12, 5, 7)
    out = extractor.extract(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    assert [part.shape[1] for part in out] == [12, 5, 7]
    assert extractor.score_name("sfd") == "sfd_three-parts"
    assert extractor.conventions() == load("three-parts").conventions()
    with pytest.raises(UserError, match="is registered already"):
        register_extractor("three-parts", Three)
    with pytest.raises(UserError, match="kept for the networks"):
        register_extractor("my-fid", Three)
    with pytest.raises(UserError, match="leave it out"):
        load("three-parts", name="other")


def test_a_function_of_the_users_code_makes_a_network():
    extractor = load("tests.evaluation.test_features:Three")
    assert extractor.score_name("fd") == "fd_Three"
    assert load("tests.evaluation.test_features:Three", name="mine").score_name("fd") == "fd_mine"
    for missing in ("tests.evaluation.test_features:Four", "no_such_module:Three"):
        with pytest.raises(UserError, match="cannot be imported"):
            load(missing)


def test_the_hash_of_a_network_in_memory_is_that_of_its_weights():
    def made(seed):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
        network.forward = lambda x: nn.Sequential.forward(network, x.float())
        return network_extractor(network, name="net", device=CPU)

    assert made(0).sha256 == made(0).sha256 != made(1).sha256


def test_only_8_bit_pictures_are_scored():
    extractor = network_extractor(Three(), name="three", device=CPU)
    for pictures in (torch.rand(2, 3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.int16)):
        with pytest.raises(UserError, match="must be uint8"):
            extractor(pictures)


def test_inception_weights_must_fit_and_be_tensors_only(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not those of the Inception network"):
        inception_extractor(tmp_path / "other.pth", device=CPU, allow_unverified=True)
    torch.save({"state": {"weight": torch.zeros(1)}}, tmp_path / "wrapped.pth")
    with pytest.raises(UserError, match="no flat state dict"):
        inception_extractor(tmp_path / "wrapped.pth", device=CPU, allow_unverified=True)
    (tmp_path / "code.pth").write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(UserError, match="truncated or not a file of weights"):
        inception_extractor(tmp_path / "code.pth", device=CPU, allow_unverified=True)


class SmallVGG(nn.Module):
    """As many classifier layers as VGG16, of which torch-fidelity cuts off the last three."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Sequential(*(nn.Flatten() for _ in range(6)), nn.Linear(2, 2))

    def forward(self, x):
        return self.classifier(x)


def test_vgg16_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.models.vgg16", SmallVGG)
    path = tmp_path / VGG16.names[0]
    torch.save({}, path)
    with pytest.raises(UserError, match="expected SHA-256 starts with 397923af"):
        load("vgg16", weights=str(tmp_path))
    with pytest.raises(UserError, match="does not fit VGG16"):
        vgg16_extractor(path, device=CPU, allow_unverified=True)
    torch.save(SmallVGG().state_dict(), path)
    extractor = vgg16_extractor(path, device=CPU, allow_unverified=True)
    assert extractor.score_name("precision").startswith("precision_vgg16-unverified-")
    out = extractor.extract(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    assert out.logits is None
    assert out.pool.min() >= 0
