"""A small network that knows moving digits: the stand-in for I3D in a Frechet distance, and the judge of the digit.

    python -m benchmarks.video_proxy --out runs/proxy.pt
    python -m benchmarks.video_proxy --out runs/proxy.pt --score runs/moving_digits_samples

Trained on clips of the training scans to tell the digit and where its centre of mass is in every frame, so that its
features hold both looks and motion. Distances over its features compare orders with each other; they are not FVD.
``--score`` says how many of the clips that sample.py wrote there (format=[npz]) show the digit asked for.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.motion import centres
from benchmarks.side_by_side import ROOT, stoppable
from vgen.data.moving_digits import MovingDigits, moving_digits
from vgen.data.source import DataSource
from vgen.errors import UserError, reported
from vgen.evaluation.features import full_float32
from vgen.runtime import pick_device

NAME = "moving-digits-proxy"
DIM = 128
NOISE = 0.05
"""Spread of the noise added to training clips, so that a decoder's background does not confuse the network."""


class VideoProxy(nn.Module):
    """Four 3D convolutions, features, and two linear readouts.

    Args:
        num_frames: frames of a clip.
        image_size: side of the frames.
        num_classes: digits.
    """

    def __init__(self, *, num_frames: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.image_size = image_size
        widths = (1, 32, 64, 128, 128)
        strides = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
        layers: list[nn.Module] = []
        for i, stride in enumerate(strides):
            layers += [nn.Conv3d(widths[i], widths[i + 1], 3, stride, 1), nn.GroupNorm(8, widths[i + 1]), nn.SiLU()]
        sides = [num_frames, image_size]
        for stride in strides:
            sides = [-(-side // step) for side, step in zip(sides, stride[:2], strict=True)]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.features = nn.Linear(widths[-1] * sides[0] * sides[1] ** 2, DIM)
        self.digit, self.track = nn.Linear(DIM, num_classes), nn.Linear(DIM, num_frames * 2)

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, DIM], class logits [B, classes] and centres [B, T, 2] in pixels of uint8 [B, 3, T, S, S]."""
        grey = clips.float().mean(1, keepdim=True) / 127.5 - 1
        if self.training:
            grey = grey + NOISE * torch.randn_like(grey)
        features = F.silu(self.features(self.body(grey)))
        track = self.track(features).unflatten(1, (-1, 2))
        return features, self.digit(features), (track + 1) * (self.image_size - 1) / 2


def open_clips(words: Sequence[str]) -> tuple[DataSource, dict[str, Any]]:
    """The data of configs/data/moving_digits.yaml with ``key=value`` words changed, and their options.

    Raises:
        UserError: for an unknown key or a value out of range.
    """
    options = yaml.safe_load((ROOT / "configs/data/moving_digits.yaml").read_text())
    del options["_target_"]
    for word in words:
        key, _, value = word.partition("=")
        if key not in options:
            raise UserError(f"--data {word}: moving digits have no option {key}; choose of {', '.join(options)}")
        options[key] = yaml.safe_load(value)
    return moving_digits(**options), options


def other_clips(dataset: MovingDigits, count: int, *, first_key: int) -> MovingDigits:
    """``count`` clips of the same scans that are in neither split: their keys begin at ``first_key``."""
    return replace(
        dataset, labels=torch.arange(count) % 10, keys=torch.arange(first_key, first_key + count), fresh=False
    )


def all_clips(dataset: MovingDigits, *, batch_size: int = 100) -> Tensor:
    """All clips of a set, uint8 [n, 3, T, S, S], one plane in memory."""
    parts = [dataset.pictures(indices)[:, 0] for indices in torch.arange(len(dataset)).split(batch_size)]
    return torch.cat(parts)[:, None].expand(-1, 3, -1, -1, -1)


def train_proxy(
    source: DataSource, *, device: torch.device, clips: int, steps: int, batch_size: int = 64, lr: float = 1e-3
) -> tuple[VideoProxy, dict[str, float]]:
    """Train on the training scans and measure on clips of scans never seen.

    Returns:
        The network in eval mode, and its test accuracy and mean distance of its centres from the true ones.
    """
    train, test = source.train, source.val
    assert isinstance(train, MovingDigits)
    assert isinstance(test, MovingDigits)
    torch.manual_seed(0)
    start = time.perf_counter()
    network = VideoProxy(num_frames=train.num_frames, image_size=train.image_size, num_classes=10).to(device)
    pool = all_clips(other_clips(train, clips, first_key=10**7))[:, :1].to(device)
    labels, places = (torch.arange(clips) % 10).to(device), torch.cat([centres(part) for part in pool.split(500)])
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        chosen = torch.randint(clips, (batch_size,), device=device)
        _, logits, track = network(pool[chosen])
        digit = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        loss = digit + F.smooth_l1_loss(track, places[chosen], beta=1.0) / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"proxy {step}/{steps} loss {loss.item():.3f} {time.perf_counter() - start:.0f} s", flush=True)
    network.eval()
    held_out = all_clips(test)
    _, guesses, track = judged(network, held_out, device)
    error = (track - centres(held_out)).norm(dim=-1).mean()
    accuracy = (guesses.argmax(1) == test.labels).double().mean()
    return network, {"test_accuracy": float(accuracy), "test_centre_error_px": float(error), "steps": steps}


def judged(network: VideoProxy, clips: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Features, logits and centres of many clips, on the CPU."""
    with torch.inference_mode(), full_float32():
        parts = [[part.cpu() for part in network(batch.to(device))] for batch in clips.split(200)]
    features, logits, track = (torch.cat(column) for column in zip(*parts, strict=True))
    return features, logits, track


def save_proxy(network: VideoProxy, report: dict[str, float], path: Path, *, num_frames: int) -> None:
    """Keep a network with its test figures, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    sizes = {"num_frames": num_frames, "image_size": network.image_size, "num_classes": 10}
    torch.save({"sizes": sizes, "report": report, "state": network.state_dict()}, partial)
    partial.replace(path)


def load_proxy(path: Path, device: torch.device) -> tuple[VideoProxy, dict[str, float]]:
    """The network in eval mode, and its test figures.

    Raises:
        UserError: if the file is missing.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; make it with python -m benchmarks.video_proxy --out {path}")
    stored = torch.load(path, weights_only=True, map_location="cpu")
    network = VideoProxy(**stored["sizes"])
    network.load_state_dict(stored["state"])
    return network.to(device).eval(), stored["report"]


def score_samples(network: VideoProxy, folder: Path, device: torch.device) -> dict[str, Any]:
    """Share of the clips that sample.py wrote which show the digit they were asked for, and which do not.

    Raises:
        UserError: if the folder holds no samples in npz format.
    """
    path = folder / "samples.npz"
    if not path.is_file():
        raise UserError(f"{path} is missing; sample clips with format=[npz]")
    import numpy as np

    with np.load(path) as stored:
        clips, labels = torch.from_numpy(stored["arr_0"]), torch.from_numpy(stored["arr_1"]).long()
    guesses = judged(network, clips.permute(0, 4, 1, 2, 3), device)[1].argmax(1)
    wrong = [f"{int(a)} looks like {int(b)}" for a, b in zip(labels, guesses, strict=True) if a != b]
    return {"clips": len(labels), "digit_accuracy": float((guesses == labels).double().mean()), "wrong": wrong}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train unless the file is there; score samples if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="file of the network")
    parser.add_argument("--data", nargs="*", default=[], metavar="key=value", help="changes of configs/data")
    parser.add_argument("--clips", type=int, default=8000, help="training clips held in memory")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--score", type=Path, help="folder of sample.py")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    with reported(), stoppable():
        device = pick_device(given.device)
        if not given.out.is_file():
            source, options = open_clips(given.data)
            network, report = train_proxy(source, device=device, clips=given.clips, steps=given.steps)
            save_proxy(network, report, given.out, num_frames=options["num_frames"])
        network, report = load_proxy(given.out, device)
        print(json.dumps(report), flush=True)
        if given.score:
            print(json.dumps(score_samples(network, given.score, device)), flush=True)


if __name__ == "__main__":
    main()
