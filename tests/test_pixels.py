import torch
from PIL import Image

from vgen.pixels import from_uint8, save_grid, to_uint8


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)


def test_values_outside_the_range_are_clamped():
    assert to_uint8(torch.tensor([-9.0, -1.0, 1.0, 9.0])).tolist() == [0, 0, 255, 255]


def test_grid_places_pictures_row_by_row(tmp_path):
    pictures = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    pictures[1] = 200
    path = save_grid(pictures, tmp_path / "deep" / "grid.png", columns=2, scale=3)
    picture = Image.open(path)
    assert picture.size == ((2 * 5 + 1) * 3, (2 * 5 + 1) * 3)
    assert picture.getpixel((3 * 3, 3 * 3)) == (0, 0, 0)
    assert picture.getpixel((8 * 3, 3 * 3)) == (200, 200, 200)
