import numpy as np
import pytest
import torch

from vgen.errors import UserError
from vgen.evaluation.pictures import Subset
from vgen.evaluation.readers import DatasetPictures, open_pictures
from vgen.evaluation.video_files import ClipChoice
from vgen.pixels import from_uint8

av = pytest.importorskip("av")


def write_video(path, frames):
    """Lossless: frame t is grey value 8 t + 4."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "bgr0"
        for t in range(frames):
            picture = np.full((16, 24, 3), 8 * t + 4, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="bgr0")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


def times(clips):
    """Frame numbers of clips uint8 [B, T, 3, H, W]."""
    return ((clips[:, :, 0, 0, 0].int() - 4) // 8).tolist()


@pytest.fixture
def folder(tmp_path):
    for name, frames in (("1/a.mkv", 20), ("0/b.mkv", 9), ("0/c.avi", 12)):
        write_video(tmp_path / name, frames)
    return tmp_path


def test_windows(folder):
    def starts(**options):
        clips = open_pictures(folder, key="reference", clips=ClipChoice(frames=4, **options))
        assert clips.frames == 4
        return [row[0] for row in times(clips.read(range(len(clips))))]

    assert starts() == [0, 0, 0]  # b, c, a
    assert starts(window="center") == [2, 4, 8]
    assert starts(window="tiles") == [0, 4, 0, 4, 8, 0, 4, 8, 12, 16]
    drawn = starts(window="random", seed=3)
    assert drawn == starts(window="random", seed=3) != starts(window="random", seed=4)
    assert all(0 <= start <= most for start, most in zip(drawn, (5, 8, 16), strict=True))
    tiles = starts(window="tiles", count=5, seed=42)
    assert len(tiles) == 5
    assert tiles == starts(window="tiles", count=5, seed=42)


def test_stride_labels_and_size(folder):
    clips = open_pictures(folder, key="reference", clips=ClipChoice(frames=3, stride=4, size=8))
    assert clips.labels.tolist() == [0, 0, 1]
    batch = clips.read([2, 0])
    assert batch.shape == (2, 3, 3, 8, 8)
    assert times(batch) == [[0, 4, 8], [0, 4, 8]]
    stretched = open_pictures(folder, key="reference", clips=ClipChoice(frames=3, size=8, resize="stretch"))
    assert stretched.read([0]).shape == (1, 3, 3, 8, 8)
    assert Subset(clips, [1], "x").frames == 3


def test_short_videos(folder):
    with pytest.raises(UserError, match=r"b\.mkv has 9 frames but a clip spans 10"):
        open_pictures(folder, key="reference", clips=ClipChoice(frames=10))
    dropped = open_pictures(folder, key="reference", clips=ClipChoice(frames=10, short="drop"))
    assert (len(dropped), dropped.dropped) == (2, 1)
    repeated = open_pictures(folder, key="reference", clips=ClipChoice(frames=10, short="repeat"))
    assert times(repeated.read([0])) == [[*range(9), 8]]
    with pytest.raises(UserError, match=r"count=4 .*gives 3"):
        open_pictures(folder, key="reference", clips=ClipChoice(frames=4, count=4))


def test_bad_videos_and_missing_choice(folder):
    with pytest.raises(UserError, match=r"evaluation\.clips"):
        open_pictures(folder, key="reference")
    (folder / "bad.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"bad\.mp4 .*replace or remove the file"):
        open_pictures(folder, key="reference", clips=ClipChoice(frames=4))
    with pytest.raises(UserError, match=r"evaluation\.clips\.window=last is unknown"):
        ClipChoice(frames=4, window="last")


def test_clips_of_an_npz(tmp_path):
    clips = np.random.default_rng(0).integers(0, 255, (3, 5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "clips.npz", clips, np.arange(3))
    opened = open_pictures(tmp_path / "clips.npz", key="samples")
    assert opened.frames == 5
    assert torch.equal(opened.read([2, 0]), torch.from_numpy(clips[[2, 0]]).permute(0, 1, 4, 2, 3))


class TinyClips:
    """A data set of clips as vgen.data makes them: pixels float [B, 3, T, S, S] in [-1, 1]."""

    num_frames = 3
    labels = torch.arange(4)
    stored = torch.randint(0, 256, (4, 3, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def without_augmentation(self):
        return self

    def __len__(self):
        return len(self.stored)

    def __getitems__(self, draws):
        return {"pixels": from_uint8(self.stored[[index for index, _ in draws]])}

    def fingerprint(self):
        return "tiny"


def test_clips_of_a_data_set():
    opened = DatasetPictures(TinyClips(), "toy")
    assert opened.frames == 3
    assert torch.equal(opened.read([2, 0]), TinyClips.stored[[2, 0]].transpose(1, 2))
