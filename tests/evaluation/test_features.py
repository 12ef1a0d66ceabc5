import pytest
import torch
from torch import nn

from tests.evaluation.helpers import FeaturesOnly, TinyExtractor, save_script
from vgen.errors import UserError
from vgen.evaluation import features
from vgen.evaluation.features import INCEPTION_FILE, load_extractor

CPU = torch.device("cpu")


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
    with pytest.raises(UserError, match="is not the Inception network"):
        load("inception")
    with pytest.raises(UserError, match="leave it out"):
        load("inception", name="mine")


def test_inception_from_a_checked_file(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.save({}, tmp_path / INCEPTION_FILE)
    monkeypatch.setattr(features, "INCEPTION_SHA256_PREFIX", features.file_sha256(tmp_path / INCEPTION_FILE)[:8])
    extractor = load("inception", weights=str(tmp_path))
    values, logits = extractor(torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8))
    assert values.shape == (1, extractor.dim)
    assert logits.shape == (1, extractor.classes)
    assert [extractor.score_name(s) for s in ("fd", "rfd", "is", "kid")] == ["fid", "rfid", "is", "kid"]
