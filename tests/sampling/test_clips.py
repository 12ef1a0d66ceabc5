"""Clips from sample.py's job: formats, frame rate, previews, first frames, long clips, animation."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints.helpers import RANDAR, clip_release
from tests.data.video_helpers import write_video
from vgen.checkpoints.release import load_pipeline
from vgen.checkpoints.sampling_job import frame_rate
from vgen.errors import UserError
from vgen.pixels import from_uint8, to_uint8
from vgen.processes import Processes
from vgen.sampling.animation import animate
from vgen.sampling.job import run_sampling
from vgen.sampling.settings import Sampling
from vgen.sampling.store import SampleStore

CPU = torch.device("cpu")
INDEX = torch.arange(3)
DATA = {"_target_": "vgen.sampling.first_frames.FromData"}
NEIGHBORING = {"_target_": "vgen.schedules.neighboring.neighboring", "_partial_": True}
PARALLEL = {"_target_": "vgen.schedules.parallel.parallel", "_partial_": True, "regions": 4}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return clip_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return clip_release(tmp_path_factory.mktemp("predictor"), predicts=True)


@pytest.fixture(scope="module")
def pipeline(release):
    return load_pipeline(release, device=CPU)


def run(pipeline, out, **changes):
    options = {"num_samples": 5, "labels": "balanced", "batch_size": 2, "fmt": "npz", "grid_pictures": 4} | changes
    return run_sampling(pipeline, Sampling(), peers=Processes(), identity={}, out=str(out), **options)


def test_every_format_and_the_previews(pipeline, tmp_path):
    out = tmp_path / "a"
    files = {path.name for path in run(pipeline, out, fmt=["npz", "mp4", "gif", "frames"], fps=5.0)}
    assert files == {"grid.gif", "grid.mp4", "grid.png", "samples.npz", "samples.json", "mp4", "gif", "frames"}
    clips = np.load(out / "samples.npz")["arr_0"]
    assert clips.shape == (5, 5, 8, 8, 3)
    labels = pipeline.labels("balanced", 5, seed=0)
    assert np.array_equal(clips, pipeline.generate(labels, torch.arange(5), Sampling()).movedim(1, -1).numpy())
    for number in range(5):
        with av.open(str(out / "mp4" / f"{number:06d}.mp4")) as container:
            stream = container.streams.video[0]
            assert (float(stream.average_rate), stream.frames, stream.width) == (5.0, 5, 8)
        frames = sorted((out / "frames" / f"{number:06d}").glob("*.png"))
        stored = np.stack([np.asarray(Image.open(path)) for path in frames])
        assert np.array_equal(stored, clips[number])
    with Image.open(out / "gif" / "000000.gif") as gif:
        total = sum(gif.seek(i) or gif.info["duration"] for i in range(gif.n_frames))
        assert total == 1000
    with av.open(str(out / "grid.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == 5.0
    with Image.open(out / "grid.png") as sheet:
        assert sheet.width > sheet.height


def test_a_killed_run_of_clips_goes_on(pipeline, tmp_path, monkeypatch):
    run(pipeline, tmp_path / "whole", fmt="both")
    write, calls = SampleStore.write, []

    def dying(self, batch):
        calls.append(batch.index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, batch)

    monkeypatch.setattr(SampleStore, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, tmp_path / "cut", fmt="both")
    monkeypatch.setattr(SampleStore, "write", write)
    run(pipeline, tmp_path / "cut", fmt="both")
    one, two = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("whole", "cut"))
    assert np.array_equal(one, two)
    assert len(list((tmp_path / "cut" / "mp4").glob("*.mp4"))) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fmt": "png"}, "format=png is not possible for clips"),
        ({"fmt": ["npz", "webm"]}, "webm"),
        ({"fps": 0.0}, "fps=0.0"),
        ({"fps": 60.0}, "fps=60.0"),
    ],
)
def test_bad_arguments_are_named(pipeline, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(pipeline, tmp_path / "a", **change)


def test_the_frame_rate_is_that_of_the_training_data(release):
    assert frame_rate(None, str(release)) == 10.0
    assert frame_rate(24.0, str(release)) == 24.0


def test_clips_are_resized_frame_by_frame(release):
    small = load_pipeline(release, device=CPU, picture_size=4)
    assert small.sample_shape == (5, 4, 4)
    assert small.generate(INDEX, INDEX, Sampling()).shape == (3, 3, 5, 4, 4)


def test_the_animation_shows_every_pass(pipeline, tmp_path):
    path = animate(pipeline, INDEX, INDEX, Sampling(), tmp_path / "decode.gif")
    with Image.open(path) as animation:
        assert animation.n_frames == 12


# First frames


def test_a_prediction_follows_from_the_first_frames_alone(predictor):
    pipeline = load_pipeline(predictor, device=CPU, predict=DATA)
    data = pipeline.start.data
    assert torch.equal(pipeline.labels("ignored", 25, seed=0), torch.arange(25) % 20 % 10)
    clips = pipeline.generate(torch.zeros(3, dtype=torch.int64), INDEX, Sampling(seed=1))
    true = torch.stack([data.val.picture(i) for i in range(3)])
    tokens = pipeline.frame_tokens(from_uint8(true[:, :, :3]))
    assert not torch.equal(tokens[0], tokens[1])
    other = load_pipeline(predictor, device=CPU, predict=DATA | {"split": "train"})
    changed = other.generate(torch.zeros(3, dtype=torch.int64), INDEX, Sampling(seed=1)) != clips
    assert changed.flatten(1).any(1).all()
    pasted = load_pipeline(predictor, device=CPU, predict=DATA | {"paste": True})
    clips = pasted.generate(torch.zeros(3, dtype=torch.int64), INDEX, Sampling(seed=1))
    assert torch.equal(clips[:, :, :3], true[:, :, :3])


def test_a_video_file_goes_on(predictor, tmp_path):
    values = write_video(tmp_path / "a.mp4", frames=8, size=(48, 32))
    start = {"_target_": "vgen.sampling.first_frames.FromVideo", "file": str(tmp_path / "a.mp4"), "start": 2}
    pipeline = load_pipeline(predictor, device=CPU, predict=start)
    frames = to_uint8(pipeline.first_frames(INDEX))
    assert frames.shape == (3, 3, 3, 8, 8)
    assert (frames[0, 0, :, 4, 4].int() - torch.tensor(values[2:5])).abs().max() <= 6
    run(pipeline, tmp_path / "out", num_samples=2)
    late = load_pipeline(predictor, device=CPU, predict=start | {"start": 6})
    with pytest.raises(UserError, match="has 8 frames"):
        late.generate(torch.zeros_like(INDEX), INDEX, Sampling())


def test_first_frames_and_generators_must_fit(release, predictor):
    with pytest.raises(UserError, match="needs their first frames"):
        load_pipeline(predictor, device=CPU)
    with pytest.raises(UserError, match="predict has no effect"):
        load_pipeline(release, device=CPU, predict=DATA)


# Long clips


@pytest.mark.parametrize(
    ("schedule", "network"),
    [
        (None, {}),
        (NEIGHBORING, {"num_readouts": 3}),
        (PARALLEL, {"num_learned": 3}),
        (RANDAR, {"position_queries": True}),
    ],
    ids=["raster", "neighboring", "parallel", "randar"],
)
def test_windows_overlap_in_every_order(tmp_path, schedule, network):
    folder = clip_release(tmp_path, schedule=schedule, **network)
    short = load_pipeline(folder, device=CPU)
    long = load_pipeline(folder, device=CPU, num_frames=12, overlap=3)
    assert long.sample_shape == (12, 8, 8)
    pixels = long.generate_pixels(INDEX, INDEX, Sampling())
    first = short.generate_pixels(INDEX, INDEX, Sampling())
    assert pixels.shape == (3, 3, 12, 8, 8)
    assert torch.equal(pixels[:, :, :5], first)
    # The next window begins with the tokens of the last frames.
    kept = []
    decode = long.tokenizer.decode
    long.tokenizer.decode = lambda ids: kept.append(ids) or decode(ids)
    long.generate_pixels(INDEX, INDEX, Sampling())
    overlap = long.tokenizer.encode(first[:, :, -3:].clamp(-1, 1))
    assert torch.equal(kept[1][:, :8], overlap)
    assert not torch.equal(kept[1][:, 8:], kept[0][:, 8:])


def test_long_clips_do_not_depend_on_the_batch(release):
    long = load_pipeline(release, device=CPU, num_frames=9)
    assert long.overlap == 3
    together = long.generate(INDEX, INDEX, Sampling())
    alone = torch.cat([long.generate(INDEX[i : i + 1], INDEX[i : i + 1], Sampling()) for i in range(3)])
    assert torch.equal(together, alone)


def test_a_predictor_goes_on_from_its_own_frames(predictor):
    long = load_pipeline(predictor, device=CPU, predict=DATA, num_frames=8)
    labels = torch.zeros(3, dtype=torch.int64)
    conditions = []
    tokens = long.frame_tokens
    long.frame_tokens = lambda frames: conditions.append(frames) or tokens(frames)
    pixels = long.generate_pixels(labels, INDEX, Sampling())
    assert pixels.shape[2] == 8
    assert torch.equal(conditions[1], pixels[:, :, 2:5].clamp(-1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 4}, "num_frames=4 must be at least the 5"),
        ({"num_frames": 9, "overlap": 2}, "not 1"),
        ({"num_frames": 9, "overlap": 5}, r"overlap=5 must lie in 1\.\.4"),
        ({"overlap": 3}, "give num_frames"),
    ],
)
def test_impossible_lengths_are_named(release, options, message):
    with pytest.raises(UserError, match=message):
        load_pipeline(release, device=CPU, **options)
