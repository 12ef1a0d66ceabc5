import random

import pytest
import torch
from PIL import Image

from vgen.data.transforms import resize_shorter
from vgen.data.video_transforms import ClipTransform, first_frames, pad_frames
from vgen.errors import UserError


def frames(count=3, height=20, width=28):
    return torch.randint(
        0, 256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_centre_crop_takes_the_middle_and_keeps_values():
    clip = ClipTransform(image_size=20, crop="center", flip=False)(frames())
    assert clip.shape == (3, 3, 20, 20)
    expected = frames()[:, :, 4:24].permute(3, 0, 1, 2) / 255
    assert torch.equal(clip, expected)


def test_resizing_is_antialiased():
    # One-pixel stripes become even grey when halved; without antialiasing they would stay stripes or vanish.
    stripes = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    clip = ClipTransform(image_size=4, crop="center", flip=False)(stripes)
    assert (clip - 0.5).abs().max() < 0.1


@pytest.mark.parametrize(("height", "width"), [(20, 28), (28, 20), (33, 20)])
def test_shorter_side_is_resized_as_for_pictures(height, width):
    picture = Image.new("RGB", (width, height))
    size = resize_shorter(picture, 10).size
    clip = ClipTransform(image_size=10, crop="center", flip=False)(frames(1, height, width))
    assert clip.shape == (3, 1, 10, 10)
    assert min(size) == 10


def test_squeezing_ignores_the_aspect():
    clip = ClipTransform(image_size=8, crop="none", flip=False)(frames())
    assert clip.shape == (3, 3, 8, 8)


def test_one_window_and_one_mirroring_per_clip_from_the_generator():
    still = frames(1).expand(4, -1, -1, -1)
    transform = ClipTransform(image_size=20, crop="random", flip=True)
    clips = [transform(still, random.Random(seed)) for seed in range(20)]
    for clip in clips:
        assert torch.equal(clip, clip[:, :1].expand(-1, 4, -1, -1))
    assert len({clip.sum().item() for clip in clips}) > 4
    assert torch.equal(clips[3], transform(still, random.Random(3)))
    central = ClipTransform(image_size=20, crop="center", flip=False)(still)
    assert torch.equal(transform(still), central)
    mirrored = ClipTransform(image_size=20, crop="center", flip=True)
    assert any(torch.equal(mirrored(still, random.Random(seed)), central.flip(-1)) for seed in range(5))


def test_padding_repeats_the_last_frame():
    clip = torch.rand(3, 2, 4, 4)
    padded = pad_frames(clip, 5)
    assert torch.equal(padded[:, :2], clip)
    assert torch.equal(padded[:, 2:], clip[:, 1:].expand(-1, 3, -1, -1))
    assert pad_frames(clip, 2) is clip
    given = first_frames(torch.rand(2, 3, 6, 4, 4), 2)
    assert given.shape == (2, 3, 6, 4, 4)
    assert torch.equal(given[:, :, 1], given[:, :, 5])


def test_bad_options():
    with pytest.raises(UserError, match=r"data\.crop=adm_center is unknown"):
        ClipTransform(image_size=8, crop="adm_center", flip=False)
    with pytest.raises(UserError, match=r"data\.image_size=0"):
        ClipTransform(image_size=0, crop="none", flip=False)
