import pytest
import torch

from tests.evaluation.helpers import golden
from vgen.evaluation import manifold
from vgen.evaluation.manifold import (
    ball_precision_recall,
    half_squared_distances,
    precision_recall_density_coverage,
    radii,
    squared_distances,
)
from vgen.evaluation.metrics import precision_recall


def sets(n=70, m=50, dim=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, dim, generator=generator), torch.randn(m, dim, generator=generator) + 0.3


@pytest.mark.parametrize("block", [7, 50, 1000])
def test_blocks_do_not_change_anything(block):
    x, y = sets()
    whole = precision_recall_density_coverage(x, y, k=5)
    assert precision_recall_density_coverage(x, y, k=5, block=block) == pytest.approx(whole)
    assert ball_precision_recall(x, y, k=3, block=block) == pytest.approx(precision_recall(x, y, neighborhood=3))


def test_radii_leave_the_point_itself_out():
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert radii(points, k=1).tolist() == [1, 1, 2, 4]
    assert radii(points, k=2, block=2).tolist() == [3, 2, 3, 6]


def test_known_density_and_coverage():
    real = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    samples = torch.tensor([[0.5], [0.6], [20.0]])
    values = precision_recall_density_coverage(samples, real, k=1)
    # both near samples lie in the balls of 0 and 1 (radius 1); no other ball holds a sample
    assert values["density"] == pytest.approx(4 / 3)
    assert values["coverage"] == 0.5
    assert values["precision"] == pytest.approx(2 / 3)


def test_equality_decides_between_the_definitions():
    real = torch.tensor([[0.0], [1.0], [5.0]])
    sample = torch.tensor([[-1.0], [50.0], [60.0]])
    assert ball_precision_recall(sample, real, k=1)[0] == pytest.approx(1 / 3)
    assert precision_recall_density_coverage(sample, real, k=1)["precision"] == 0


def test_half_precision_rounds_and_falls_back():
    x = 10 + torch.rand(20, 8, generator=torch.Generator().manual_seed(1))
    exact, half = squared_distances(x, x), half_squared_distances(x, x)
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, atol=2.0, rtol=0)
    large = x * 100  # squares overflow float16
    assert torch.equal(half_squared_distances(large, large), squared_distances(large, large))


def test_ties_of_the_golden_survive_blocks(monkeypatch):
    monkeypatch.setattr(manifold, "BLOCK", 30)
    tensors = golden("prc_ties")
    values = precision_recall_density_coverage(tensors["in.x1"], tensors["in.x2"], k=5)
    assert values["density"] == pytest.approx(float(tensors["out.prdc_density"]))
