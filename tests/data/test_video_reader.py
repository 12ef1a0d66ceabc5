import io
import sys

import numpy as np
import pytest
import torch

from tests.data.video_helpers import CODECS, write_video
from vgen.data.video_reader import SEEK_FROM, BrokenVideoError, probe, read_frames
from vgen.errors import UserError

COARSE = {"gif": 40}


@pytest.fixture(scope="module", params=sorted(CODECS))
def video(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / f"clip.{request.param}"
    return path, write_video(path, frames=70), COARSE.get(request.param, 8)


def test_frames_are_counted_and_found_by_number(video):
    path, values, tolerance = video
    info = probe(path, str(path))
    assert (info.frames, info.width, info.height) == (70, 48, 32)
    assert info.fps == pytest.approx(10)
    for indices in ([0, 3, 11], [69], [SEEK_FROM, SEEK_FROM + 1, 68], [5, 5, 6]):
        frames = read_frames(path, indices, str(path))
        assert frames.shape == (len(indices), 32, 48, 3)
        assert frames.dtype == torch.uint8
        found = frames.float().mean((1, 2, 3))
        assert found.tolist() == pytest.approx([values[i] for i in indices], abs=tolerance)


def test_seeking_gives_the_frames_of_decoding_from_the_start(video):
    path, _, _ = video
    everything = read_frames(path, range(70), str(path))
    assert torch.equal(read_frames(path, range(SEEK_FROM, 70), str(path)), everything[SEEK_FROM:])


def test_bytes_are_read_like_files(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path)
    data = io.BytesIO(path.read_bytes())
    assert probe(data, "a") == probe(path, "a")
    assert torch.equal(read_frames(data, [2, 5], "a"), read_frames(path, [2, 5], "a"))


@pytest.mark.parametrize("content", [b"", b"no video at all", None], ids=["empty", "text", "truncated"])
def test_broken_files_are_named(tmp_path, content):
    path = tmp_path / "bad.avi"
    if content is None:
        write_video(path)
        content = path.read_bytes()[:300]
    path.write_bytes(content)
    with pytest.raises(BrokenVideoError, match=r"bad\.avi \("):
        probe(path, str(path))


def test_frames_beyond_the_end_are_an_error(tmp_path):
    path = tmp_path / "short.mp4"
    write_video(path, frames=5)
    with pytest.raises(BrokenVideoError, match="ends before frame 9"):
        read_frames(path, [3, 9], str(path))


def test_audio_alone_is_no_video(tmp_path):
    import av

    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(BrokenVideoError, match="no video stream"):
        probe(path, str(path))


def test_missing_library_is_named_with_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install \"vgen\[video\]\""):
        probe(tmp_path / "a.mp4", "a")
