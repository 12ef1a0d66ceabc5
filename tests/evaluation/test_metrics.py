import json

import pytest
import torch

from tests.evaluation.helpers import GOLDEN, golden
from vgen.errors import UserError
from vgen.evaluation.metrics import (
    StreamingInceptionScore,
    codebook_scores,
    f_score,
    inception_score,
    kernel_distance,
    precision_recall,
    sliced_distance,
    squared_mmd,
)
from vgen.evaluation.pixel_metrics import PSNR_CAP, pooled_psnr, psnr, ssim
from vgen.evaluation.quantise import QUANTISE_RULES, quantise
from vgen.evaluation.resize import RESIZE_MODES, resize_pictures
from vgen.pixels import from_uint8, to_uint8
from vgen.processes import Processes


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


def test_streaming_inception_score_of_two_halves():
    values = golden("isc_a")["in.logits"]
    halves = [StreamingInceptionScore(values.shape[1]) for _ in range(2)]
    for half, part in zip(halves, values.split([33, len(values) - 33]), strict=True):
        half.update(part)

    class Both(Processes):
        def sum(self, tensor):
            other = {0: torch.tensor(float(halves[1].count)), 1: halves[1].sum}.get(tensor.ndim)
            return tensor + (halves[1].entropy if tensor is halves[0].entropy else other)

    halves[0].reduce(Both())
    assert halves[0].count == len(values)
    assert halves[0].score() == pytest.approx(inception_score(values, splits=1, seed=0)[0], rel=1e-9)
    assert StreamingInceptionScore(3).score() != StreamingInceptionScore(3).score()  # NaN


def test_mmd_of_equal_distributions_is_about_zero_and_sees_a_shift():
    x, y = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0))
    for kernel in ({}, {"degree": 2, "coef0": 0.5}, {"rbf_sigma": 2.0}):
        assert squared_mmd(x, y[:200] + 1, **kernel) > 5 * abs(squared_mmd(x, y[:200], **kernel))


def test_sliced_distance_is_repeatable_and_zero_for_one_set():
    x, y = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0))
    assert sliced_distance(x, x, projections=20, seed=1) == 0
    assert sliced_distance(x, y[:40], projections=20, seed=1) == sliced_distance(x, y[:40], projections=20, seed=1)
    assert sliced_distance(x, y, projections=20, seed=1) != sliced_distance(x, y, projections=20, seed=2)


def test_mind_uses_torch_fidelitys_default():
    x, y = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    assert sliced_distance(x, y, seed=1) == sliced_distance(x, y, projections=1000, seed=1)


def test_codebook_scores():
    values = codebook_scores(torch.tensor([4, 4, 0, 0]))
    assert values == pytest.approx({"codebook_usage": 0.5, "codebook_entropy_bits": 1.0, "codebook_perplexity": 2.0})
    assert f_score(0.0, 0.0) == 0
    assert f_score(0.5, 0.25) == pytest.approx(1 / 3)


def test_pooled_psnr_is_another_number():
    original = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    made = original.clone()
    made[0] += 1
    made[1] += 50
    assert pooled_psnr(made, original) < float(psnr(made, original).mean())
    assert pooled_psnr(original, original) == PSNR_CAP


@pytest.mark.parametrize("rule", QUANTISE_RULES)
def test_only_rounding_rules_return_8_bit_pictures(rule):
    levels = torch.arange(256, dtype=torch.uint8)
    darker = int((quantise(from_uint8(levels), rule) != levels).sum())
    assert (darker > 0) == (rule in ("adm", "titok")) or rule == "titok"
    assert quantise(torch.tensor([-2.0, 2.0]), rule).tolist() == [0, 255]


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_resizes_keep_constant_pictures_and_the_range(mode):
    flat = torch.full((2, 3, 9, 14), 77, dtype=torch.uint8)
    torch.testing.assert_close(resize_pictures(flat, 20, mode), torch.full((2, 3, 20, 20), 77.0), atol=1e-4, rtol=0)
    noise = torch.randint(0, 2, (1, 3, 40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)) * 255
    resized = resize_pictures(noise, 21, mode)
    assert resized.dtype == torch.float32
    assert -1e-3 <= float(resized.min()) <= float(resized.max()) <= 255.001


def test_unknown_conventions_are_named():
    picture = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(UserError, match="choose one of tf1_bilinear"):
        resize_pictures(picture, 8, "bilinear")
    with pytest.raises(UserError, match="choose one of gaussian"):
        ssim(picture, picture, convention="mean")
    with pytest.raises(UserError, match="choose one of round"):
        quantise(torch.zeros(1), "floor")
