import hashlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from vgen.errors import UserError
from vgen.evaluation import clip_features
from vgen.evaluation.clip_features import clip_extractor, load_clip_script, load_fvd_extractor
from vgen.evaluation.frechet import FeatureStatistics
from vgen.evaluation.fvd import FVD_VARIANTS, fvd_variant, prepare_clips
from vgen.evaluation.i3d import I3D, load_i3d
from vgen.evaluation.weights import I3D_KINETICS
from vgen.pixels import to_uint8

CPU = torch.device("cpu")


class Means(nn.Module):
    """Mean of every colour of the first and the last frame."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return clips[:, :, [0, -1]].mean((3, 4)).flatten(1)


class Detector(nn.Module):
    """The signature of the TorchScript I3D; returns the arguments it was given and the range it saw."""

    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        assert x.is_contiguous()
        flags = torch.tensor([float(rescale), float(resize), float(return_features), float(x.shape[4])])
        return torch.cat([flags.expand(x.shape[0], 4), x.flatten(1).amin(1)[:, None], x.flatten(1).amax(1)[:, None]], 1)


def clips(count=2, frames=3, height=20, width=30):
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(0, 256, (count, 3, frames, height, width), dtype=torch.uint8, generator=generator)
    made[:, :, 0, 0, 0], made[:, :, 0, 0, 1] = 0, 255
    return made


@pytest.mark.parametrize("name", FVD_VARIANTS)
def test_every_variant_prepares_pictures_and_floats_alike(name):
    variant, made = fvd_variant(name), clips()
    from_bytes = prepare_clips(made, variant, side=16)
    from_floats = prepare_clips(made.float() / 255, variant, side=16)
    torch.testing.assert_close(from_bytes, from_floats, atol=1e-5, rtol=0)
    assert from_bytes.dtype == torch.float32
    assert from_bytes.is_contiguous()
    assert from_bytes.shape[3:] == ((20, 30) if variant.fit == "detector" else (16, 16))
    low, high = (0, 255) if variant.rescale else (-1, 1)
    assert from_bytes.min() >= low
    assert from_bytes.max() <= high
    grey = made[:, :1]
    assert torch.equal(
        prepare_clips(grey, variant, side=16), prepare_clips(grey.expand(-1, 3, -1, -1, -1), variant, side=16)
    )


def test_floats_are_quantised_as_each_paper_does():
    made = torch.full((1, 3, 1, 4, 4), 100.7 / 255)
    levels = {name: float(prepare_clips(made, fvd_variant(name), side=4)[0, 0, 0, 0, 0]) for name in FVD_VARIANTS}
    as_level = {name: v if fvd_variant(name).rescale else (v + 1) * 127.5 for name, v in levels.items()}
    expected = {"stylegan_v": 101, "larp": 100.7, "tats": 100, "common_styleganv": 100.7, "common_videogpt": 100}
    assert as_level == pytest.approx(expected, abs=1e-3)
    assert int(to_uint8(made * 2 - 1)[0, 0, 0, 0, 0]) == 101


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (torch.zeros(1, 3, 16, 8), "must be"),
        (torch.zeros(1, 2, 9, 8, 8), "must be"),
        (torch.full((1, 3, 9, 8, 8), -0.5), "float in"),
        (torch.full((1, 3, 9, 8, 8), 200.0), "float in"),
        (torch.zeros(1, 3, 9, 8, 8, dtype=torch.int64), "float in"),
    ],
)
def test_clips_of_another_range_or_shape_are_refused(made, message):
    with pytest.raises(UserError, match=message):
        prepare_clips(made, fvd_variant("tats"))


def test_unknown_variant():
    with pytest.raises(UserError, match="choose one of stylegan_v, larp, tats"):
        fvd_variant("fvd")


@pytest.mark.parametrize(
    ("name", "flags", "limits"),
    [
        ("stylegan_v", [1, 1, 1, 30], (0, 255)),
        ("larp", [0, 1, 1, 30], (-1, 1)),
        ("common_styleganv", [0, 0, 1, 224], None),
    ],
)
def test_the_torchscript_detector_is_called_as_each_paper_does(tmp_path, name, flags, limits):
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(Detector()).save(str(path))
    extractor = load_fvd_extractor(fvd_variant(name), path, device=CPU)
    features = extractor(clips())
    assert features.shape == (2, extractor.dim)
    assert features[0, :4].tolist() == flags
    if limits:
        assert tuple(features[0, 4:].tolist()) == limits
    assert extractor.score_name("fvd") == f"fvd_{name}"
    assert extractor.describe()["sha256"] == extractor.sha256 != ""
    assert extractor.variant.ddof == (1 if name.startswith("common") else 0)
    with pytest.raises(UserError, match="at least 9 frames"):
        extractor.check_frames(8)


def test_kinetics_weights_are_checked_and_loaded_strictly(tmp_path, monkeypatch):
    path = tmp_path / "i3d_pretrained_400.pt"
    state = I3D().state_dict()
    torch.save(state, path)
    variant = fvd_variant("tats")
    with pytest.raises(UserError, match="git blob a867b87a"):
        load_fvd_extractor(variant, path, device=CPU)
    stand_in = load_fvd_extractor(variant, path, device=CPU, allow_unverified=True)
    assert stand_in.score_name("fvd").startswith("video_fd_i3d-unverified-")
    data = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    monkeypatch.setitem(clip_features.DETECTORS, "kinetics400", replace(I3D_KINETICS, git_blob=blob))
    assert load_fvd_extractor(variant, path, device=CPU).score_name("rfvd") == "rfvd_tats"
    with pytest.raises(UserError, match=r"Kinetics-400 .* not found"):
        load_fvd_extractor(variant, tmp_path / "none.pt", device=CPU)
    kept = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert torch.equal(load_i3d(kept).logits.conv3d.bias, state["logits.conv3d.bias"])
    with pytest.raises(UserError, match="not those of I3D"):
        load_i3d({key: value for key, value in kept.items() if "Mixed_4e" not in key})
    with pytest.raises(UserError, match="not those of I3D"):
        load_i3d({**kept, "extra.weight": torch.zeros(1)})


def test_i3d_refuses_sizes_that_give_maps():
    network = load_i3d(I3D().state_dict())
    for shape in ((1, 3, 8, 224, 224), (1, 3, 9, 256, 256)):
        with pytest.raises(UserError, match="at least 9 frames of 224x224"):
            network(torch.zeros(shape))


def test_stand_ins_carry_their_name(tmp_path):
    path = tmp_path / "colour-means.pt"
    torch.jit.script(Means()).save(str(path))
    extractor = load_clip_script(path, fvd_variant("stylegan_v"), name=None, device=CPU)
    assert extractor.score_name("fvd") == "video_fd_colour-means"
    assert extractor.dim == 6
    features = extractor(clips())
    torch.testing.assert_close(features[:, 0], clips()[:, 0, 0].float().mean((1, 2)) / 127.5 - 1, atol=0.02, rtol=0)
    statistics = FeatureStatistics(extractor.dim)
    statistics.update(features)
    assert statistics.gaussian(features, ddof=extractor.variant.ddof).ddof == 0
    with pytest.raises(UserError, match="kept for the networks"):
        clip_extractor(Means(), fvd_variant("tats"), name="my-i3d", device=CPU)
    with pytest.raises(UserError, match="returned something else"):
        clip_extractor(nn.Identity(), fvd_variant("tats"), name="same", device=CPU)
    with pytest.raises(UserError, match="failed on a black clip"):
        clip_extractor(nn.Linear(3, 4), fvd_variant("tats"), name="linear", device=CPU)
    (tmp_path / "broken.pt").write_text("nothing")
    with pytest.raises(UserError, match="not a readable TorchScript"):
        load_clip_script(tmp_path / "broken.pt", fvd_variant("tats"), name=None, device=CPU)
