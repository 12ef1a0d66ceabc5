import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from tests.evaluation.helpers import golden
from tests.evaluation.two_processes import SHARES, WORLD, rows, stream_share, streamed
from vgen.errors import UserError
from vgen.evaluation.frechet import FeatureStatistics, Gaussian, frechet_distance, gaussian_of
from vgen.processes import Processes

CASES = ("d1", "d16", "rankdef_d48_n30", "two_samples", "identical", "constant_columns")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("ddof", "key"), [(1, "out.exact_unbiased"), (0, "out.exact_biased")])
def test_equals_the_exact_value(case, ddof, key):
    tensors = golden(f"frechet_{case}")
    value = frechet_distance(gaussian_of(tensors["in.x1"], ddof=ddof), gaussian_of(tensors["in.x2"], ddof=ddof))
    assert value == pytest.approx(float(tensors[key]), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_exact_value_without_the_samples(case):
    tensors = golden(f"frechet_{case}")
    fits = [Gaussian(len(tensors[f"in.x{i}"]), tensors[f"out.mu{i}"], tensors[f"out.sigma{i}"]) for i in (1, 2)]
    assert frechet_distance(*fits) == pytest.approx(float(tensors["out.exact_unbiased"]), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_statistics_of_the_goldens(case):
    tensors = golden(f"frechet_{case}")
    fit = gaussian_of(tensors["in.x1"])
    torch.testing.assert_close(fit.mean, tensors["out.mu1"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fit.covariance, tensors["out.sigma1"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dim", [3, 40])
def test_equals_torch_fidelity(dim):
    generator = torch.Generator().manual_seed(dim)
    a = (
        torch.randn(300, dim, generator=generator, dtype=torch.float64)
        @ torch.randn(dim, dim, generator=generator).double()
    )
    b = torch.randn(200, dim, generator=generator, dtype=torch.float64).abs() * 3
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False)
    assert frechet_distance(gaussian_of(a), gaussian_of(b)) == pytest.approx(
        theirs["frechet_inception_distance"], rel=1e-8
    )


def test_forms_for_few_and_for_many_samples_agree():
    features = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    many = frechet_distance(gaussian_of(features[0]), gaussian_of(features[1]))
    few = gaussian_of(features[1][:10])
    without_rows = FeatureStatistics(16)
    without_rows.update(features[1][:10])
    exact = frechet_distance(gaussian_of(features[0]), few)
    assert few.factor is not None
    assert exact == pytest.approx(frechet_distance(gaussian_of(features[0]), without_rows.gaussian()), rel=1e-6)
    assert exact > many


@pytest.mark.parametrize("name", ["stream_stats", "stream_stats_offset"])
def test_streamed_statistics(name):
    tensors = golden(name)
    statistics = FeatureStatistics(tensors["out.mu"].numel())
    for key in sorted(k for k in tensors if k.startswith("in.x_r")):
        for batch in tensors[key].split(9):
            statistics.update(batch)
    statistics.update(torch.empty(0, tensors["out.mu"].numel()))
    assert statistics.count == int(tensors["out.n"])
    offset = float(tensors["out.mu"].abs().max())
    for ddof, key in ((1, "out.sigma_unbiased"), (0, "out.sigma_biased")):
        fit = statistics.gaussian(ddof=ddof)
        torch.testing.assert_close(fit.mean, tensors["out.mu"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fit.covariance, tensors[key], rtol=1e-9, atol=1e-9 * (1 + offset**2))
    sums = statistics.count * statistics.mean
    torch.testing.assert_close(sums, tensors["out.sum"], rtol=1e-12, atol=1e-9)
    outer = statistics.scatter + torch.outer(sums, sums) / statistics.count
    torch.testing.assert_close(outer, tensors["out.outer"], rtol=1e-9, atol=1e-9)


def test_a_large_offset_does_not_cancel():
    features = torch.randn(500, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifted = gaussian_of(features + 1e6)
    torch.testing.assert_close(shifted.covariance, gaussian_of(features).covariance, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(frechet_distance(shifted, shifted), 0, atol=1e-9)


def test_refuses_one_sample_and_not_finite_features():
    statistics = FeatureStatistics(3)
    statistics.update(torch.ones(1, 3))
    with pytest.raises(UserError, match="at least 2 pictures"):
        statistics.gaussian()
    with pytest.raises(UserError, match="NaN or infinite"):
        statistics.update(torch.tensor([[1.0, float("nan"), 0.0]]))


def test_two_processes_give_what_one_gives(tmp_path):
    torch.multiprocessing.spawn(stream_share, (tmp_path,), WORLD)
    alone = streamed(rows())
    for name in SHARES:
        for rank in range(WORLD):
            count, mean, scatter = torch.load(tmp_path / f"{name} {rank}.pt", weights_only=True)
            assert count == alone.count
            torch.testing.assert_close(mean, alone.mean, rtol=1e-12, atol=0)
            torch.testing.assert_close(scatter, alone.scatter, rtol=1e-9, atol=1e-9)


def test_merged_states_equal_one_pass():
    parts = [streamed(part) for part in rows().split([50, 1, 50])]
    total = FeatureStatistics(20)
    total.merge(FeatureStatistics(20))
    for part in parts:
        total.merge(part)
    torch.testing.assert_close(total.gaussian().covariance, gaussian_of(rows()).covariance, rtol=1e-11, atol=1e-13)
    with pytest.raises(UserError, match="cannot be merged"):
        total.merge(FeatureStatistics(3))


def test_constant_features_and_half_the_rank_cost_no_accuracy():
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(400, 15, generator=generator, dtype=torch.float64) for _ in range(2))
    mixing = torch.randn(15, 30, generator=generator, dtype=torch.float64)
    wide = [torch.cat([part @ mixing, torch.full((400, 2), 0.1, dtype=torch.float64)], 1) for part in (x, y)]
    exact = frechet_distance(*(gaussian_of(part) for part in wide))
    streamed_only = frechet_distance(*(streamed(part).gaussian() for part in wide))
    assert streamed_only == pytest.approx(exact, rel=1e-9)


def test_a_nan_on_a_device_is_found_no_later_than_the_end():
    statistics = FeatureStatistics(2)
    statistics.update(torch.ones(3, 2))
    statistics._finite = torch.tensor(False)  # as a device leaves it that is asked one batch late
    for read in (statistics.gaussian, lambda: statistics.reduce(Processes())):
        with pytest.raises(UserError, match="NaN or infinite"):
            read()
