"""How fast pictures reach the disk: tokens, pixels, uint8 on the host, and files written in the background.

    python -m benchmarks.end_to_end --size L --batch 256 --samples 2048 --pixels bfloat16 --channels-last

Random weights; the tokenizer is LlamaGen's VQ-16. Each part is timed alone, then the whole, as sample.py runs it; the
last column says how much of the slower part's speed the whole reaches.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from benchmarks.decode import seconds_of
from benchmarks.networks import ORDERS, SIZES, make_generator, make_plan
from vgen.errors import reported
from vgen.processes import Processes
from vgen.runtime import pick_device, pick_dtype
from vgen.sampling.engine import Engine
from vgen.sampling.job import run_sampling
from vgen.sampling.pipeline import Pipeline
from vgen.sampling.pixels import DTYPES, PixelSettings
from vgen.sampling.settings import Guidance, Sampling
from vgen.tokenizers.vqgan import VQGAN

HEADER = "| order | batch | engine | pixels | tokens, images/s | pixels, images/s | whole, images/s | of slower part |"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="L")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--channels", type=int, default=128, help="of the tokenizer at full resolution")
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["neighboring"])
    parser.add_argument("--engine", choices=get_args(Engine), default="auto")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--format", choices=("npz", "png", "both"), default="npz")
    parser.add_argument("--pixels", choices=DTYPES, default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every order that was asked for."""
    given = parse(arguments)
    with reported():
        device, dtype = pick_device(given.device), pick_dtype(given.dtype)
        tokenizer = VQGAN(
            image_size=given.image_size,
            base_channels=given.channels,
            encoder_multipliers=[1, 1, 2, 2, 4],
            decoder_multipliers=[1, 1, 2, 2, 4],
            codebook_size=given.vocab,
        )
        tokenizer.to(device).eval()
        settings = PixelSettings(given.pixels, given.channels_last, given.compile)
        print(HEADER + "\n" + "|---" * (HEADER.count("|") - 1) + "|", flush=True)
        for order in given.orders:
            plan = make_plan(order, (tokenizer.grid[0], tokenizer.grid[1]))
            generator = make_generator(given.size, plan, device=device, dtype=dtype, vocab_size=given.vocab)
            pipeline = Pipeline(
                generator=generator, tokenizer=tokenizer, plan=plan, engine=given.engine, pixels=settings
            )
            print(measure(pipeline, given, order), flush=True)


def measure(pipeline: Pipeline, given: argparse.Namespace, order: str) -> str:
    """Time the parts and the whole; a line of the table."""
    sampling = Sampling(guidance=Guidance(scale=2.0))
    device, batch = pipeline.device, given.batch
    labels, index = torch.arange(batch) % 1000, torch.arange(batch)
    ids = torch.randint(pipeline.generator.vocab_size, (batch, pipeline.plan.num_tokens), device=device)
    for _ in range(2):
        pipeline.generate(labels, index, sampling)
    tokens_s = seconds_of(lambda: pipeline.generate_ids(labels, index, sampling), device)
    pixels_s = seconds_of(lambda: pipeline.pixel_decoder(ids, index.to(device), 0).cpu(), device)

    with tempfile.TemporaryDirectory() as folder:

        def whole() -> None:
            run_sampling(
                pipeline,
                sampling,
                peers=Processes(),
                identity={},
                out=str(Path(folder) / "samples"),
                num_samples=given.samples,
                labels="random",
                batch_size=batch,
                fmt=given.format,
                grid_pictures=0,
            )

        whole_s = seconds_of(whole, device)
    rate, slower = given.samples / whole_s, batch / max(tokens_s, pixels_s)
    pixels = f"{given.pixels}{', channels last' * given.channels_last}{', compiled' * given.compile}"
    return (
        f"| {order} | {batch} | {given.engine} | {pixels} | {batch / tokens_s:.1f} | {batch / pixels_s:.1f} "
        f"| {rate:.1f} | {rate / slower:.1%} |"
    )


if __name__ == "__main__":
    main()
