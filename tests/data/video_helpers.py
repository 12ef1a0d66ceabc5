"""Tiny videos whose every frame can be told apart: frame i of video v is nearly uniform with a known grey value."""

import io
from fractions import Fraction

import av
import numpy as np

CODECS = {"mp4": "libx264", "mkv": "libx264", "avi": "mpeg4", "webm": "libvpx-vp9", "gif": "gif"}


def grey(video, frame):
    return (40 + 60 * video + 9 * frame) % 200 + 20


def write_video(path, *, video=0, frames=12, size=(48, 32), fps=10, form=None):
    """A video of (width, height); returns the grey values of its frames."""
    form = form or path.suffix[1:]
    container = av.open(
        str(path) if path is not None else io.BytesIO(), "w", format={"mkv": "matroska"}.get(form, form)
    )
    stream = container.add_stream(CODECS[form], rate=Fraction(fps))
    stream.width, stream.height = size
    stream.pix_fmt = "rgb8" if form == "gif" else "yuv420p"
    if form in ("mp4", "mkv"):
        # B-frames and long groups: what makes seeking hard.
        stream.options = {"bf": "2", "g": "60", "crf": "10"}
    values = [grey(video, i) for i in range(frames)]
    for value in values:
        picture = np.full((size[1], size[0], 3), value, dtype=np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode(None))
    container.close()
    return values


def write_classes(root, *, names=("cat", "dog"), per_class=3, frames=12):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for video in range(per_class):
            write_video(root / name / f"{video}.mp4", video=number, frames=frames)
