import json

import pytest
import torch

from tests.evaluation.helpers import GOLDEN, golden
from vgen.evaluation.metrics import inception_score, kernel_distance, precision_recall
from vgen.evaluation.pixel_metrics import PSNR_CAP, psnr, ssim
from vgen.pixels import to_uint8


@pytest.mark.parametrize("name", ["isc_a", "isc_uneven"])
def test_inception_score(name):
    tensors, args = golden(name), json.loads((GOLDEN / f"{name}.json").read_text())["args"]
    mean, std = inception_score(tensors["in.logits"], splits=args["splits"], seed=args["rng_seed"])
    assert mean == pytest.approx(float(tensors["out.torch_fidelity_mean"]), rel=1e-9)
    assert std == pytest.approx(float(tensors["out.torch_fidelity_std"]), rel=1e-9)
    one, _ = inception_score(tensors["in.logits"], splits=1, seed=args["rng_seed"])
    assert one == pytest.approx(float(tensors["out.one_split"]), rel=1e-9)


def test_kernel_distance():
    tensors = golden("kid_poly")
    mean, std = kernel_distance(tensors["in.x1"], tensors["in.x2"], subsets=20, subset_size=50, seed=2020)
    assert mean == pytest.approx(float(tensors["out.kid_mean"]), rel=2e-5)
    assert std == pytest.approx(float(tensors["out.kid_std"]), rel=2e-5)


@pytest.mark.parametrize("name", ["prc_a", "prc_ties"])
def test_precision_recall(name):
    tensors = golden(name)
    precision, recall = precision_recall(tensors["in.x1"], tensors["in.x2"], neighborhood=3)
    assert precision == pytest.approx(float(tensors["out.tf_part_precision"]), abs=1e-6)
    assert recall == pytest.approx(float(tensors["out.tf_part_recall"]), abs=1e-6)


def test_psnr_and_ssim():
    tensors = golden("psnr_ssim")
    made, originals = (tensors[key].permute(0, 3, 1, 2) for key in ("in.rec", "in.gt"))
    torch.testing.assert_close(psnr(made, originals), tensors["out.psnr_per_image"], rtol=0, atol=1e-4)
    assert float(psnr(made, originals).mean()) == pytest.approx(float(tensors["out.psnr_mean_of_images"]), abs=1e-4)
    for key in ("out.ssim_skimage_gaussian", "out.ssim_opencv"):
        torch.testing.assert_close(ssim(made, originals), tensors[key].double(), rtol=0, atol=1e-5)


def test_an_exact_copy_is_capped():
    picture = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert psnr(picture, picture).tolist() == [PSNR_CAP, PSNR_CAP]
    torch.testing.assert_close(ssim(picture, picture), torch.ones(2, dtype=torch.float64))


def test_quantisation_is_that_of_llamagen():
    tensors = golden("quantise")
    assert torch.equal(to_uint8(tensors["in.x"]), tensors["out.llamagen"])
