"""Frechet distance and class accuracy of a generator against the guidance scale, in one process.

    python -m benchmarks.frechet_sweep reference DATA FEATURES OUT.npz
    python -m benchmarks.frechet_sweep tokenizer RELEASE DATA FEATURES OUT.npz
    python -m benchmarks.frechet_sweep generator RELEASE FEATURES OUT.npz --scales 1,1.5,2 --samples 10000 --final 50000

``reference`` stores the statistics of the training pictures of a Hugging-Face-layout folder; the two others compare
with them. ``generator`` samples every scale, then the best one again with ``--final`` samples, and draws grids.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vgen.checkpoints.release import load_pipeline, load_tokenizer
from vgen.data.parquet import parquet
from vgen.data.source import DataSource
from vgen.evaluation.features import Extractor, load_extractor
from vgen.evaluation.frechet import FeatureStatistics, Gaussian, frechet_distance
from vgen.evaluation.pixel_metrics import psnr
from vgen.evaluation.statistics import SetStatistics, load_statistics, save_statistics
from vgen.pixels import from_uint8, save_grid, to_uint8
from vgen.runtime import pick_cache_dtype, pick_device
from vgen.sampling.pipeline import make_labels, sample_stream
from vgen.sampling.settings import Guidance, Sampling
from vgen.sampling.store import grid_order

DATA = {
    "image_size": None,
    "crop": None,
    "flip": False,
    "val_fraction": 0.05,
    "val_split": None,
    "image_column": "image",
    "label_column": "label",
    "num_classes": None,
    "class_names": None,
    "in_memory": True,
    "seed": 0,
}


def pictures(dataset, batch_size: int = 500) -> Iterator[Tensor]:
    """uint8 [B, 3, H, W] batches of a data set."""
    for start in range(0, len(dataset), batch_size):
        chosen = range(start, min(start + batch_size, len(dataset)))
        yield torch.stack([torch.as_tensor(dataset.picture(i)) for i in chosen])


def statistics(extractor: Extractor, batches: Iterator[Tensor]) -> Gaussian:
    """Mean and covariance of the features of pictures."""
    collected = FeatureStatistics(extractor.dim, extractor.device)
    for batch in batches:
        collected.update(extractor(batch)[0])
    return collected.gaussian()


def open_data(path: str) -> DataSource:
    """The data set of a folder, without augmentation."""
    return parquet(path=path, **DATA)


def reference(arguments: argparse.Namespace, extractor: Extractor) -> None:
    """Store the statistics of the training pictures and print the distance of the test pictures, the floor."""
    source = open_data(arguments.data)
    train, test = (statistics(extractor, pictures(part)) for part in (source.train, source.val))
    print(json.dumps({"fd_test_vs_train": frechet_distance(test, train)}))
    save_statistics(Path(arguments.out), SetStatistics(train))


def tokenizer(arguments: argparse.Namespace, extractor: Extractor) -> None:
    """Score the reconstructions of the test pictures."""
    train, test = load_statistics(Path(arguments.out)).pool, open_data(arguments.data).val
    network = load_tokenizer(arguments.release).to(extractor.device)
    real, collected = (FeatureStatistics(extractor.dim, extractor.device) for _ in range(2))
    quality, used = [], []
    for batch in pictures(test):
        batch = batch.to(extractor.device)
        with torch.inference_mode():
            ids = network.encode(from_uint8(batch))
            rebuilt = to_uint8(network.decode(ids))
        real.update(extractor(batch)[0])
        collected.update(extractor(rebuilt)[0])
        quality.append(psnr(rebuilt, batch))
        used.append(ids.flatten())
    rebuilt_statistics = collected.gaussian()
    counts = torch.bincount(torch.cat(used), minlength=network.codebook_size).double()
    report = {
        "rfd_vs_test": frechet_distance(rebuilt_statistics, real.gaussian()),
        "rfd_vs_train": frechet_distance(rebuilt_statistics, train),
        "psnr": torch.cat(quality).mean().item(),
        "codebook_usage": (counts > 0).double().mean().item(),
        "perplexity": torch.special.entr(counts / counts.sum()).sum().exp().item(),
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    print(json.dumps(report))


def generator(arguments: argparse.Namespace, extractor: Extractor) -> None:
    """Score samples at every guidance scale."""
    known = load_statistics(Path(arguments.out)).pool
    dtype = torch.bfloat16 if extractor.device.type == "cuda" else torch.float32
    pipeline = load_pipeline(
        arguments.release,
        device=extractor.device,
        dtype=dtype,
        cache_dtype=pick_cache_dtype(arguments.cache_dtype),
        num_tokens=arguments.num_tokens,
    )
    results = []
    for scale in [float(part) for part in arguments.scales.split(",")]:
        results.append(score(pipeline, extractor, known, scale, arguments.samples, arguments))
        print(json.dumps(results[-1]), flush=True)
    best = min(results, key=lambda row: row["fd"])["scale"]
    print(json.dumps({"final": score(pipeline, extractor, known, best, arguments.final, arguments)}))


def score(pipeline, extractor: Extractor, known: Gaussian, scale: float, count: int, arguments) -> dict:
    """Distance to the training pictures, accuracy and speed, features included, of samples at one guidance scale."""
    guidance = Guidance(scale=scale, schedule=arguments.schedule, power=arguments.power)
    labels = make_labels("balanced", count, pipeline.num_classes, seed=0)
    collected, hits, shown = FeatureStatistics(extractor.dim, extractor.device), 0, []
    stream = sample_stream(pipeline, labels, Sampling(guidance=guidance), batch_size=arguments.batch_size)
    start = time.perf_counter()
    for batch in stream:
        features, logits = extractor(batch.images)
        collected.update(features)
        hits += int((logits.argmax(-1).cpu() == batch.labels).sum()) if logits is not None else 0
        if len(shown) < 1:
            shown.append(batch)
    # The next batch is under way while features are taken: the two cannot be told apart.
    seconds = time.perf_counter() - start
    index, columns = grid_order(shown[0].labels, pipeline.num_classes, 100)
    save_grid(shown[0].images[index], Path(arguments.pictures) / f"samples_{scale}.png", columns=columns, scale=2)
    fd = frechet_distance(collected.gaussian(), known)
    return {"scale": scale, "n": count, "fd": fd, "accuracy": hits / count, "images_per_s": count / seconds}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True)
    for job, names in (
        (reference, ("data", "features", "out")),
        (tokenizer, ("release", "data", "features", "out")),
        (generator, ("release", "features", "out")),
    ):
        command = jobs.add_parser(job.__name__)
        command.set_defaults(job=job)
        for name in names:
            command.add_argument(name)
    command.add_argument("--scales", default="1,1.25,1.5,1.75,2,2.5")
    command.add_argument("--schedule", default="constant")
    command.add_argument("--power", type=float, default=1.0)
    command.add_argument("--samples", type=int, default=10000)
    command.add_argument("--final", type=int, default=50000)
    command.add_argument("--batch-size", type=int, default=1000)
    command.add_argument("--num-tokens", type=int, help="first tokens kept of every sample (FlexTok); default all")
    command.add_argument("--cache-dtype", help="of keys and values, as sample.py's cache_dtype")
    command.add_argument("--pictures", default="runs/sweep")
    arguments = parser.parse_args()
    extractor = load_extractor(arguments.features, name="cifar10", weights=None, device=pick_device())
    arguments.job(arguments, extractor)


if __name__ == "__main__":
    main()
