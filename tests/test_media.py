import sys

import av
import pytest
import torch
from PIL import Image

from vgen.errors import UserError
from vgen.media import contact_sheet, save_frames, save_gif, save_mp4, strips, tiled


def clip(frames=6, height=32, width=48):
    """Grey ramps that get brighter with time."""
    ramp = torch.linspace(0, 120, width).expand(height, width)
    times = torch.arange(frames)[:, None, None] * (120 / frames)
    return (ramp + times).to(torch.uint8).expand(3, -1, -1, -1)


def read(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        return torch.stack(frames), stream.average_rate


@pytest.mark.parametrize("fps", [8, 25, 23.976, 29.97])
def test_mp4_has_all_frames_at_the_right_rate(tmp_path, fps):
    original = clip()
    path = save_mp4(original, tmp_path / "deep" / "a.mp4", fps=fps)
    frames, rate = read(path)
    assert float(rate) == pytest.approx(fps, abs=1e-3)
    assert frames.shape == (6, 32, 48, 3)
    assert (frames.float() - original.permute(1, 2, 3, 0).float()).abs().mean() < 3
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]


def test_odd_sizes_gain_a_copy_of_the_edge(tmp_path):
    original = clip(height=31, width=45)
    frames, _ = read(save_mp4(original, tmp_path / "a.mp4", fps=10))
    assert frames.shape == (6, 32, 46, 3)
    assert (frames[:, :31, :45].float() - original.permute(1, 2, 3, 0).float()).abs().mean() < 3
    assert (frames[:, :, 45].float() - frames[:, :, 44].float()).abs().mean() < 6


@pytest.mark.parametrize(("fps", "total"), [(8, 750), (24, 250), (10, 600), (30, 200)])
def test_gif_keeps_frames_and_length(tmp_path, fps, total):
    path = save_gif(clip(), tmp_path / "a.gif", fps=fps)
    with Image.open(path) as image:
        assert image.n_frames == 6
        assert image.info["loop"] == 0
        times = []
        for number in range(6):
            image.seek(number)
            times.append(image.info["duration"])
    assert sum(times) == total


def test_equal_frames_of_a_gif_keep_their_time(tmp_path):
    still = clip(frames=1).expand(-1, 5, -1, -1)
    path = save_gif(still, tmp_path / "a.gif", fps=10)
    with Image.open(path) as image:
        assert image.n_frames == 1
        assert image.info["duration"] == 500


def test_frames_are_lossless(tmp_path):
    original = clip(height=7, width=9)
    paths = save_frames(original, tmp_path / "frames")
    assert [path.name for path in paths] == [f"frame-{i:04d}.png" for i in range(6)]
    with Image.open(paths[4]) as image:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(7, 9, 3)
    assert torch.equal(pixels, original[:, 4].permute(1, 2, 0))


def test_strips_show_first_and_last_frame():
    clips = torch.stack([clip(frames=40), clip(frames=40)])
    cells, columns = strips(clips, most=8)
    assert cells.shape == (16, 3, 32, 48)
    assert columns == 8
    assert torch.equal(cells[0], clips[0, :, 0])
    assert torch.equal(cells[7], clips[0, :, -1])
    assert strips(clips[:, :, :3])[1] == 3


def test_contact_sheet(tmp_path):
    path = contact_sheet(torch.stack([clip()] * 3), tmp_path / "sheet.png", frames=4, scale=2)
    with Image.open(path) as image:
        assert image.size == (2 * (4 * 49 + 1), 2 * (3 * 33 + 1))


def test_tiles():
    clips = torch.stack([clip(), clip().flip(-1), clip()])
    sheet = tiled(clips, columns=2)
    assert sheet.shape == (3, 6, 2 * 34 + 2, 2 * 50 + 2)
    assert torch.equal(sheet[:, :, 2:34, 2:50], clips[0])
    assert torch.equal(sheet[:, :, 2:34, 52:100], clips[1])
    assert torch.equal(sheet[:, :, 36:68, 2:50], clips[2])
    assert (sheet[:, :, 36:68, 52:100] == 0).all()
    assert (sheet[:, :, :2] == 255).all()


def test_errors_name_the_fix(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="fps=0 must be a positive"):
        save_mp4(clip(), tmp_path / "a.mp4", fps=0)
    with pytest.raises(UserError, match="too fast for a GIF"):
        save_gif(clip(), tmp_path / "a.gif", fps=60)
    with pytest.raises(UserError, match="without frames"):
        save_gif(clip()[:, :0], tmp_path / "a.gif", fps=6)
    (tmp_path / "file").write_text("")
    for save in (save_mp4, save_gif):
        with pytest.raises(UserError, match="cannot be written"):
            save(clip(), tmp_path / "file" / "a.mp4", fps=6)
    assert not list(tmp_path.glob("*partial*"))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="pip install"):
        save_mp4(clip(), tmp_path / "a.mp4", fps=6)


def test_nothing_is_left_of_a_failed_file(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left"):
        save_gif(clip(), tmp_path / "a.gif", fps=6)
    assert list(tmp_path.iterdir()) == []
