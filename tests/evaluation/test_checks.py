import pytest
import torch

from tests.evaluation.helpers import quadrant_pictures
from vgen.errors import UserError
from vgen.evaluation import classifier
from vgen.evaluation.classifier import LabelledPictures, classifier_accuracy
from vgen.evaluation.nearest import nearest_neighbours, save_nearest
from vgen.evaluation.shifts import moved_copies


def pictures(count, seed):
    array, labels = quadrant_pictures(count, seed=seed)
    return LabelledPictures(torch.from_numpy(array).permute(0, 3, 1, 2), torch.from_numpy(labels))


def test_classifier_recognises_right_labels_and_not_wrong_ones():
    training, held_out, samples = (pictures(n, seed) for seed, n in enumerate((80, 40, 40)))
    wrong = LabelledPictures(samples.pictures, (samples.labels + 1) % 4)
    assert classifier_accuracy(training, held_out, samples, shift=0) == {
        "classifier_accuracy": 1.0,
        "classifier_accuracy_real": 1.0,
    }
    assert classifier_accuracy(training, held_out, wrong, shift=0)["classifier_accuracy"] == 0.0


def test_classifier_refuses_large_sets_and_a_single_class(monkeypatch):
    one = pictures(8, 0)
    same = LabelledPictures(one.pictures, torch.zeros(8, dtype=torch.int64))
    with pytest.raises(UserError, match="at least 2 classes"):
        classifier_accuracy(same, one, one, shift=0)
    monkeypatch.setattr(classifier, "MAX_TRAINING_PICTURES", 7)
    with pytest.raises(UserError, match="for small sets, the reference has 8"):
        classifier_accuracy(one, one, one, shift=0)
    monkeypatch.setattr(classifier, "MAX_TRAINING_PICTURES", 71)
    with pytest.raises(UserError, match=r"evaluation\.shift=0"):
        classifier_accuracy(one, one, one, shift=1)


def test_nearest_tells_copies_from_new_pictures(tmp_path):
    training, held_out, fresh = (pictures(60, seed).pictures for seed in range(3))
    new = nearest_neighbours(fresh, training, held_out, shift=0).metrics
    assert new["nearest_exact"] == 0
    assert new["nearest_ratio"] == pytest.approx(1, abs=0.1)
    copies = training[[5, 3, 5]]
    result = nearest_neighbours(copies, training, held_out, shift=0)
    assert result.neighbours.tolist() == [5, 3, 5]
    assert result.metrics["nearest_ratio"] == 0
    assert result.metrics["nearest_close"] == result.metrics["nearest_exact"] == 1
    near = copies.clone()
    near[:, :, 0, 0] ^= 1
    metrics = nearest_neighbours(near, training, held_out, shift=0).metrics
    assert metrics["nearest_exact"] == 0
    assert metrics["nearest_close"] == 1
    assert save_nearest(result, copies, training, tmp_path / "pairs.png").stat().st_size > 0


def test_nearest_finds_a_moved_copy():
    training, held_out = (torch.nn.functional.pad(pictures(30, seed).pictures, (1,) * 4) for seed in range(2))
    moved = training[:4].roll((1, -1), (2, 3))
    assert nearest_neighbours(moved, training, held_out, shift=0).metrics["nearest_exact"] == 0
    result = nearest_neighbours(moved, training, held_out, shift=1)
    assert result.metrics["nearest_exact"] == 1
    assert result.neighbours.tolist() == [0, 1, 2, 3]


def test_the_classifier_recognises_moved_pictures_it_was_told_of():
    training, samples = pictures(80, 0), pictures(40, 1)
    moved = LabelledPictures(samples.pictures.roll((2, 2), (2, 3)), samples.labels)
    without, with_moves = (
        classifier_accuracy(training, samples, moved, shift=shift)["classifier_accuracy"] for shift in (0, 2)
    )
    assert with_moves == 1
    assert with_moves >= without


def test_moved_copies():
    picture = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3)
    copies = list(moved_copies(picture, 1))
    assert len(copies) == 9
    assert torch.equal(copies[4], picture)
    assert copies[0].flatten().tolist() == [0, 0, 0, 0, 1, 2, 0, 4, 5]
