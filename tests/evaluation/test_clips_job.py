"""Jobs on clips: Frechet video distance with a stand-in for I3D, and stored reconstructions of clips and pictures."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.evaluation.helpers import TinyExtractor, compose_config, quadrant_pictures, save_npz, save_script
from vgen.errors import UserError
from vgen.evaluation.frechet import frechet_distance, gaussian_of
from vgen.evaluation.fvd import FVD_VARIANTS, prepare_clips
from vgen.evaluation.job import evaluate
from vgen.evaluation.pixel_metrics import psnr, ssim


class TinyClipNet(nn.Module):
    """Mean of every channel in the first and in the last frame."""

    def forward(self, clips: Tensor) -> Tensor:
        return torch.cat([clips[:, :, 0].mean((2, 3)), clips[:, :, -1].mean((2, 3))], 1)


def clips(count, seed, frames=9):
    return np.random.default_rng(seed).integers(0, 255, (count, frames, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def files(tmp_path):
    torch.set_num_threads(1)
    np.savez(tmp_path / "samples.npz", clips(7, 0))
    np.savez(tmp_path / "real.npz", clips(9, 1))
    save_script(TinyClipNet(), tmp_path / "toy.pt")
    return tmp_path


def run(files, *overrides):
    fixed = (f"samples={files}/samples.npz", f"reference={files}/real.npz", "device=cpu")
    return evaluate(compose_config(*fixed, *overrides))


def test_the_video_distance_of_a_stand_in_carries_its_name(files):
    report = run(
        files, "metrics=[fvd,kvd,fd,isc]", f"evaluation.features={files}/toy.pt", "evaluation.fvd_variant=tats"
    )
    rows = []
    for array in (clips(7, 0), clips(9, 1)):
        prepared = prepare_clips(torch.from_numpy(array).permute(0, 4, 1, 2, 3), FVD_VARIANTS["tats"])
        rows.append(TinyClipNet()(prepared))
    expected = frechet_distance(*(gaussian_of(part) for part in rows))
    assert report["metrics"]["video_fd_toy"] == pytest.approx(expected, rel=1e-6)
    assert "video_kd_toy" in report["metrics"]
    assert not [name for name in report["metrics"] if "fvd" in name]
    assert report["skipped"] == {"fd": "the samples are clips", "isc": "the samples are clips"}
    assert report["dataset"]["clip_frames"] == 9
    assert report["estimator"]["fvd_variant"] == "tats"
    assert report["comparable_with_published"] is False


def test_the_divisor_is_that_of_the_variant(files):
    toy = f"evaluation.features={files}/toy.pt"
    n, n_minus_1 = (run(files, "metrics=[fvd]", toy, f"evaluation.fvd_variant={v}") for v in ("stylegan_v", "tats"))
    assert n["estimator"]["covariance_divisor"] == "n"
    assert n_minus_1["estimator"]["covariance_divisor"] == "n-1"
    assert n["metrics"]["video_fd_toy"] < n_minus_1["metrics"]["video_fd_toy"]


def test_missing_i3d_weights_stop_the_job_by_name(files, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(files / "none"))
    monkeypatch.delenv("VGEN_WEIGHTS", raising=False)
    for variant, name in (("larp", "i3d_torchscript.pt"), ("tats", "i3d_pretrained_400.pt")):
        with pytest.raises(UserError, match=f"{name} .*evaluation.weights="):
            run(files, "metrics=[fvd]", f"evaluation.fvd_variant={variant}")


def test_all_missing_weights_are_named_at_once(files, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(files / "none"))
    monkeypatch.delenv("VGEN_WEIGHTS", raising=False)
    save_npz(files / "real.npz", 5, seed=0)
    save_npz(files / "samples.npz", 5, seed=0)
    with pytest.raises(UserError, match=r"weights-inception-2015-12-05-6726825d\.pth.*vgg16-397923af\.pth"):
        run(files, "job=reconstruction", "metrics=[fid,lpips,psnr]")


def test_clips_and_pictures_or_other_lengths_are_not_compared(files):
    np.savez(files / "real.npz", clips(9, 1, frames=10))
    with pytest.raises(UserError, match=r"samples are clips of 9 frames but .* clips of 10 frames"):
        run(files, "metrics=[fvd]", f"evaluation.features={files}/toy.pt")
    save_npz(files / "real.npz", 5, seed=0)
    with pytest.raises(UserError, match=r"samples are clips of 9 frames but .* holds pictures"):
        run(files, "metrics=[fvd]", f"evaluation.features={files}/toy.pt")


def test_stored_reconstructions_of_clips(files):
    noisy = (clips(9, 1).astype(int) + 3).clip(0, 255).astype(np.uint8)
    np.savez(files / "samples.npz", noisy)
    toy = f"evaluation.features={files}/toy.pt"
    report = run(files, "job=reconstruction", "metrics=[psnr,fvd,codebook]", toy)
    pair = (torch.from_numpy(array).movedim(-1, 2) for array in (noisy, clips(9, 1)))
    assert report["metrics"]["psnr"] == pytest.approx(float(psnr(*pair).mean()))
    assert "video_rfd_toy" in report["metrics"]
    assert "needs checkpoint=" in report["skipped"]["codebook"]


def test_stored_reconstructions_of_pictures(files):
    save_script(TinyExtractor(), files / "tiny.pt")
    pictures, _ = quadrant_pictures(20, seed=0)
    noisy = (pictures.astype(int) + np.random.default_rng(0).integers(-9, 9, pictures.shape)).clip(0, 255)
    np.savez(files / "real.npz", pictures)
    np.savez(files / "samples.npz", noisy.astype(np.uint8))
    options = ("job=reconstruction", "metrics=[psnr,ssim,fd]", f"evaluation.features={files}/tiny.pt")
    report = run(files, *options)
    pair = [torch.from_numpy(array).permute(0, 3, 1, 2) for array in (noisy.astype(np.uint8), pictures)]
    assert report["metrics"]["ssim"] == pytest.approx(float(ssim(*pair).mean()))
    assert report["metrics"]["rfd_tiny"] > 0
    assert "ssim_llamagen" in run(files, *options, "evaluation.ssim=llamagen")["metrics"]
    np.savez(files / "samples.npz", noisy.astype(np.uint8)[:, :8])
    with pytest.raises(UserError, match=r"reconstructions have shape \[3, 8, 12\] but originals \[3, 12, 12\]"):
        run(files, *options)
