"""Speed of a FID job with a random-weight Inception: reading, features, streaming statistics, distance.

    python -m benchmarks.evaluation --images 50000 --batch 256 --device auto
    python -m benchmarks.evaluation --network pooled --size 32 --features --device cpu   # host memory of a full job

The pictures are noise in an .npz batch of the ADM suite, mapped from the disk; ``--stored`` distinct ones are read over
and over. Prints images/s of the whole pass, the share of the time the network kept the device busy (1 = nothing but the
device limits the job), the time of the distance itself, and the host memory of the process. Random weights cost what
the published ones do. ``--network pooled`` puts averages over pixels in Inception's place: as many features for next to
no work, so that the memory of a job of 50,000 pictures can be measured without a GPU; its speed means nothing.
"""

import argparse
import dataclasses
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vgen.evaluation.collect import Wanted, collect, read_batches
from vgen.evaluation.features import Extractor
from vgen.evaluation.frechet import frechet_distance
from vgen.evaluation.inception import CLASSES, POOL_DIM, SPATIAL_DIM, Inception
from vgen.evaluation.pictures import Subset
from vgen.evaluation.readers import open_pictures
from vgen.processes import Processes
from vgen.runtime import pick_device


class Timed(nn.Module):
    """A network that remembers how long the device worked on its forward passes."""

    def __init__(self, network: nn.Module, device: torch.device):
        super().__init__()
        self.network, self.cuda = network, device.type == "cuda"
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.host = 0.0

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Features of the network, timed."""
        if not self.cuda:
            start = time.perf_counter()
            output = self.network(pictures)
            self.host += time.perf_counter() - start
            return output
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        output = self.network(pictures)
        events[1].record()
        self.events.append(events)
        return output

    def seconds(self) -> float:
        """Time so far."""
        if self.cuda:
            torch.cuda.synchronize()
        return self.host + sum(start.elapsed_time(end) for start, end in self.events) / 1000

    def reset(self) -> None:
        """Forget the passes so far."""
        self.events.clear()
        self.host = 0.0


class Pooled(nn.Module):
    """Averages over pixels and zero logits, as wide as what Inception returns of pictures uint8 [B, 3, H, W]."""

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stand-ins for pool [B, 2048], logits [B, classes] and spatial features [B, 2023]."""
        pixels = pictures.flatten(1).float()
        pool = nn.functional.adaptive_avg_pool1d(pixels, POOL_DIM)
        return pool, pool.new_zeros(len(pool), CLASSES), nn.functional.adaptive_avg_pool1d(pixels, SPATIAL_DIM)


def random_extractor(device: torch.device, name: str) -> tuple[Extractor, Timed]:
    """A network without published weights, timed; its scores would mean nothing and carry no published name."""
    torch.manual_seed(0)
    network = Timed(Pooled() if name == "pooled" else Inception(None).to(device), device)
    extractor = Extractor(
        network, "random", "2048", None, "", "tf1_bilinear", device, POOL_DIM, CLASSES, spatial_dim=SPATIAL_DIM
    )
    return extractor, network


def noise(path: Path, count: int, size: int) -> Path:
    """An .npz batch of noise pictures uint8 [count, size, size, 3]."""
    np.savez(path, np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    return path


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Command line; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--stored", type=int, default=2000, help="distinct pictures on the disk")
    parser.add_argument("--features", action="store_true", help="keep all features, as KID and precision/recall need")
    parser.add_argument("--network", choices=["inception", "pooled"], default="inception")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    extractor, network = random_extractor(device, options.network)
    with tempfile.TemporaryDirectory() as folder:
        stored = open_pictures(
            noise(Path(folder) / "noise.npz", min(options.stored, options.images), options.size), key="samples"
        )
        warm = torch.arange(min(options.batch, len(stored))).tolist()
        extractor.extract(stored.read(warm))  # kernels are chosen on the first call
        network.seconds()
        network.reset()
        pictures = Subset(stored, [i % len(stored) for i in range(options.images)], "noise")
        start = time.perf_counter()
        batches = read_batches(pictures, batch_size=options.batch, processes=Processes(), description="features")
        found = collect(
            batches,
            total=options.images,
            wanted=Wanted(gaussian=True, features=options.features),
            extractor=extractor,
            processes=Processes(),
        )
        busy = network.seconds()
        seconds = time.perf_counter() - start
    assert found.gaussian is not None
    start = time.perf_counter()
    frechet_distance(found.gaussian, dataclasses.replace(found.gaussian, mean=found.gaussian.mean + 0.01))
    distance = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    values = {
        "images_per_s": options.images / seconds,
        "device_share": busy / seconds,
        "distance_s": distance,
        "memory_gb": memory,
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}: {options.images} pictures of {options.size}x{options.size} in {seconds:.1f} s")
    print(f"{values['images_per_s']:.1f} images/s, device-bound share {values['device_share']:.2f}")
    print(f"Frechet distance of {POOL_DIM} dimensions: {distance:.1f} s; peak host memory {memory:.2f} GB")
    return values


if __name__ == "__main__":
    main()
