import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vgen.data.broken import BrokenImageError, BrokenImages, decode_image
from vgen.data.transforms import (
    ImageTransform,
    adm_center_crop,
    adm_random_crop,
    resize_shorter,
    ten_crop,
    to_pixels,
    to_rgb,
    to_tensor,
)
from vgen.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "llamagen" / "image_pipeline.safetensors"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture
def picture(golden):
    return Image.fromarray(golden["in.image"].to(torch.uint8).numpy())


def hwc(image):
    return to_tensor(image).permute(1, 2, 0).long()


def test_adm_crops_match_the_original(golden, picture):
    # The golden allows +-1 for another Pillow version.
    assert (hwc(adm_center_crop(picture, 20)) - golden["out.center_crop"]).abs().max() <= 1
    assert (hwc(adm_center_crop(picture, 22)) - golden["out.center_crop_big"]).abs().max() <= 1
    drawn = adm_random_crop(picture, 20, rng=random.Random(71))
    assert (hwc(drawn) - golden["out.random_crop"]).abs().max() <= 1
    assert (hwc(adm_random_crop(picture, 20, rng=random.Random(72))) - golden["out.random_crop"]).abs().max() > 1


def test_ten_crop_matches_the_original(golden, picture):
    crops = ten_crop(adm_center_crop(picture, 22), 20)
    assert (torch.stack([hwc(crop) for crop in crops]) - golden["out.ten_crop"]).abs().max() <= 1
    torch.testing.assert_close(to_pixels(crops[0]), golden["out.first_crop_tensor"], atol=0.008, rtol=0)


def test_resize_shorter_follows_torchvision(picture):
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    theirs = CenterCrop(31)(Resize(31, interpolation=InterpolationMode.BICUBIC)(picture))
    ours = ImageTransform(image_size=31, crop="center", flip=False)(picture)
    assert torch.equal(to_tensor(ours), to_tensor(theirs))
    assert resize_shorter(picture, 31).size == (31, 38)


@pytest.mark.parametrize("crop", ["adm_center", "adm_random", "center", "random", "none"])
def test_every_crop_gives_the_size(picture, crop):
    transform = ImageTransform(image_size=16, crop=crop, flip=True)
    plain, drawn = transform(picture), [transform(picture, random.Random(i)) for i in range(8)]
    assert {image.size for image in [plain, *drawn]} == {(16, 16)}
    different = {image.tobytes() for image in drawn}
    assert len(different) > 2 if transform.is_random_crop else len(different) == 2
    assert transform(picture, random.Random(3)).tobytes() == drawn[3].tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "middle", "image_size": 8}, "data.crop=middle"),
        ({"crop": "center", "image_size": None}, "data.image_size"),
        ({"crop": "none", "image_size": 0}, "data.image_size=0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        ImageTransform(flip=False, **options)


def corner(image):
    return to_rgb(image).getpixel((0, 0))


def test_modes_become_rgb():
    assert corner(Image.new("L", (2, 2), 77)) == (77, 77, 77)
    assert corner(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    assert corner(Image.new("RGBA", (2, 2), (10, 20, 30, 0))) == (255, 255, 255)
    assert corner(Image.new("RGBA", (2, 2), (10, 20, 30, 255))) == (10, 20, 30)
    assert corner(Image.new("LA", (2, 2), (40, 255))) == (40, 40, 40)
    assert corner(Image.new("CMYK", (2, 2), (0, 255, 255, 0))) == (255, 0, 0)
    assert corner(Image.new("RGB", (2, 2), (9, 200, 30)).quantize(4)) == (9, 200, 30)
    assert corner(Image.fromarray(np.full((2, 2), 257 * 100, dtype=np.uint16))) == (100, 100, 100)
    assert corner(Image.fromarray(np.full((2, 2), 257 * 100, dtype=np.int32))) == (100, 100, 100)


def test_transparent_palette_lies_on_white():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30])
    image.info["transparency"] = 0
    assert corner(image) == (255, 255, 255)


def test_broken_bytes_are_named(tmp_path):
    path = tmp_path / "a.png"
    Image.effect_noise((32, 32), 50).save(path)
    whole = path.read_bytes()
    assert decode_image(whole, "a").size == (32, 32)
    for data in (None, b"", b"not an image", whole[: len(whole) // 2]):
        with pytest.raises(BrokenImageError, match=r"shelf/a\.png"):
            decode_image(data, "shelf/a.png")


def test_broken_images_summary():
    broken = BrokenImages(["b"])
    broken.add(["a", "b", "c"])
    assert len(broken) == 3
    assert broken.names == ["b", "a", "c"]
    assert broken.summary(limit=2).splitlines() == ["3 broken images were skipped:", "  b", "  a", "  ... and 1 more"]
    assert BrokenImages().summary() == ""
