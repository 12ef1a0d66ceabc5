import pytest
import torch

from vgen.evaluation.adm import adm_inception_score, adm_precision_recall, class_mixed
from vgen.evaluation.inception import spatial_features
from vgen.evaluation.metrics import inception_score


def logits(classes=10, per_class=20):
    """Confident logits of samples sorted by class."""
    labels = torch.arange(classes).repeat_interleave(per_class)
    return 8.0 * torch.nn.functional.one_hot(labels, classes).float(), labels


def test_samples_sorted_by_class_are_capped():
    values, labels = logits()
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    capped = adm_inception_score(values, split_size=40)
    assert capped < 2.01
    assert adm_inception_score(values[order], split_size=40) > 3 * capped
    assert not class_mixed(labels, split_size=40)
    assert class_mixed(labels[order], split_size=40)


def test_one_block_is_one_split_and_a_short_block_counts_whole():
    values, _ = logits()
    noisy = values + torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    assert adm_inception_score(noisy) == pytest.approx(inception_score(noisy, splits=1, seed=0)[0], rel=1e-5)
    parts = [adm_inception_score(part) for part in noisy.split(150)]
    assert adm_inception_score(noisy, split_size=150) == pytest.approx(sum(parts) / 2)


def test_probabilities_that_underflow_do_not_spoil_the_score():
    values = torch.tensor([[0.0, -200.0], [-200.0, 0.0]])
    assert adm_inception_score(values) == pytest.approx(2.0, rel=1e-6)


def test_half_precision_is_a_choice():
    generator = torch.Generator().manual_seed(0)
    x, y = (20 + torch.randn(200, 16, generator=generator) for _ in range(2))
    assert adm_precision_recall(x, y) != adm_precision_recall(x, y, half=True)


def test_spatial_features_are_ordered_height_width_channel():
    maps = torch.arange(2 * 9 * 2 * 3).view(2, 9, 2, 3)
    features = spatial_features(maps)
    assert features.shape == (2, 7 * 2 * 3)
    assert features[1, :7].tolist() == maps[1, :7, 0, 0].tolist()
    assert features[1, 7:14].tolist() == maps[1, :7, 0, 1].tolist()
