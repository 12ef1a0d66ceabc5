import pytest
import torch

from tests.data.test_sources import build
from vgen.data.loader import build_loader
from vgen.errors import UserError

SMALL = {"image_size": 24, "num_frames": 40, "digit_size": 12, "train_clips": 30, "val_clips": 20}


def test_clips_have_a_class_and_one_length():
    source = build("moving_digits", **SMALL)
    assert (source.num_frames, source.image_size, source.num_classes) == (40, 24, 10)
    assert (len(source.train), len(source.val)) == (30, 20)
    assert source.val.labels.bincount().tolist() == [2] * 10
    batch = source.train.__getitems__([(3, 100), (4, 101)])
    assert batch["pixels"].shape == (2, 3, 40, 24, 24)
    assert batch["label"].tolist() == [3, 4]
    assert batch["pixels"].min() == -1
    assert source.val.picture(2).shape == (3, 40, 24, 24)
    assert source.val.raw(2).size == (24, 24)


def test_the_digit_keeps_its_shape_and_moves_along_a_reflected_line():
    clip = build("moving_digits", **SMALL).val.picture(7)[0].float()
    mass = clip.sum((1, 2))
    # The whole digit stays inside the frame, so nothing is cut off.
    assert (mass == mass[0]).all()
    rows = (clip.sum(2) * torch.arange(24)).sum(1) / mass
    columns = (clip.sum(1) * torch.arange(24)).sum(1) / mass
    steps = torch.stack([rows.diff(), columns.diff()])
    speed = steps.abs().max(1).values
    # Rounded to whole pixels, so never faster than one pixel beyond the speed; and it bounces off the edges.
    assert speed.max() <= 5 + 1
    assert (steps > 0.5).any()
    assert (steps < -0.5).any()


def test_same_seed_same_clips_whatever_the_batch():
    source, again = build("moving_digits", **SMALL), build("moving_digits", **SMALL)
    draws = [(i, 50 + i) for i in range(6)]
    together = source.train.__getitems__(draws)["pixels"]
    assert torch.equal(together, torch.cat([again.train.__getitems__([draw])["pixels"] for draw in draws]))
    assert source.train.fingerprint() == again.train.fingerprint()
    other = build("moving_digits", **SMALL, seed=1)
    assert other.train.fingerprint() != source.train.fingerprint()
    assert not torch.equal(other.train.__getitems__(draws)["pixels"], together)


def test_fresh_clips_change_with_the_draw_and_others_do_not():
    fresh, fixed = (build("moving_digits", **SMALL, fresh=flag).train for flag in (True, False))
    assert not torch.equal(fresh.__getitems__([(0, 1)])["pixels"], fresh.__getitems__([(0, 2)])["pixels"])
    once = fixed.__getitems__([(0, 1)])["pixels"]
    assert torch.equal(once, fixed.__getitems__([(0, 2)])["pixels"])
    assert torch.equal(once[0], fixed[0]["pixels"])
    calm = fresh.without_augmentation()
    assert torch.equal(calm.__getitems__([(0, 1)])["pixels"], calm.__getitems__([(0, 2)])["pixels"])


def test_no_scan_is_in_both_splits():
    source = build("moving_digits", **SMALL)
    train = {tuple(scan.flatten().tolist()) for scan in source.train.scans}
    assert not any(tuple(scan.flatten().tolist()) in train for scan in source.val.scans)


def test_several_digits_of_the_class():
    one, two = (build("moving_digits", **SMALL, num_digits=n).val.picture(3)[0].float() for n in (1, 2))
    assert two.sum() > 1.2 * one.sum()


def test_loader_and_subset():
    source = build("moving_digits", **SMALL)
    loader = build_loader(source.train, batch_size=5, seed=0, shuffle=True, drop_last=True)
    assert len(list(loader)) == 6
    part = source.val.subset(torch.tensor([4, 9]))
    assert torch.equal(part[1]["pixels"], source.val[9]["pixels"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digit_size": 24}, "data.digit_size=24"),
        ({"num_frames": 0}, "data.num_frames=0"),
        ({"num_digits": 0}, "data.num_digits=0"),
        ({"min_speed": 9.0}, "data.min_speed=9.0"),
        ({"val_clips": 3}, "data.val_clips must be at least 10"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(UserError, match=message):
        build("moving_digits", **SMALL | changes)
