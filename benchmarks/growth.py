"""How the cost of decoding grows with the batch, the grid and the size of the network.

    python -m benchmarks.growth --out runs/growth

Random weights, tokens only, guidance 2. Three sweeps around GPT-L on 16x16 tokens: the batch from 1 to 512, the grid
from 8x8 to 48x48, and the network from B to XXL. Finished rows are kept in OUT/growth.jsonl, so that repeating the
command goes on where it stopped; a row that does not fit in memory is kept as such. The table and the plot are made
from the rows there are.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.cost import Ceilings, measure_ceilings
from benchmarks.decode import measure
from benchmarks.measurements import add, rows
from benchmarks.networks import ORDERS, SIZES, make_generator, make_plan
from vgen.errors import reported
from vgen.runtime import pick_device, pick_dtype
from vgen.sampling.engine import Engine
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.building import parse_grid

SWEEPS = ("batch", "size", "grid")


@dataclass(frozen=True)
class Point:
    """What one measurement is made at."""

    sweep: str
    order: str
    size: str
    grid: str
    batch: int


def points(arguments: argparse.Namespace) -> Iterator[Point]:
    """All measurements, those of one network next to each other."""
    size, grid = arguments.size, arguments.grid
    for order in arguments.orders:
        for batch in arguments.batches:
            yield Point("batch", order, size, grid, batch)
    for order in arguments.orders:
        for other in arguments.sizes:
            for batch in arguments.size_batches:
                yield Point("size", order, other, grid, batch)
    for order in arguments.orders:
        for other in arguments.grids:
            yield Point("grid", order, size, other, arguments.grid_batch)


def take(point: Point, arguments: argparse.Namespace, ceilings: Ceilings, device: torch.device) -> dict[str, Any]:
    """Measure one point."""
    plan = make_plan(point.order, parse_grid(point.grid))
    generator = make_generator(
        point.size, plan, device=device, dtype=pick_dtype(arguments.dtype), vocab_size=arguments.vocab
    )
    try:
        row = measure(
            generator,
            plan,
            order=point.order,
            batch=point.batch,
            engine=arguments.engine,
            ceilings=ceilings,
            sampling=Sampling(guidance=Guidance(scale=2.0)),
            repeats=arguments.repeats,
        )
    except torch.OutOfMemoryError:
        return asdict(point) | {"seconds": None}
    return asdict(row) | asdict(point)


def _place(row: dict[str, Any]) -> tuple[int, str, int, int, int]:
    """By sweep and order, then as the sweep grows."""
    tokens = torch.Size(parse_grid(row["grid"])).numel()
    return SWEEPS.index(row["sweep"]), row["order"], list(SIZES).index(row["size"]), tokens, row["batch"]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of all rows."""
    lines = [
        "| sweep | order | size | grid | batch | passes | seconds | images/s | of bound | GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=_place):
        start = f"| {row['sweep']} | {row['order']} | {row['size']} | {row['grid']} | {row['batch']} "
        if row["seconds"] is None:
            lines.append(start + "| | out of memory | | | |")
        else:
            lines.append(
                start + f"| {row['passes']} | {row['seconds']:.4f} | {row['images_per_s']:.1f} | {row['share']:.0%} "
                f"| {row['peak_gib']:.1f} |"
            )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Images/s over the batch, seconds over the tokens, and seconds over the size, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2))
    known = [row for row in rows if row["seconds"] is not None]
    sizes = [size for size in SIZES if any(row["size"] == size for row in known)]
    for order in dict.fromkeys(row["order"] for row in known):
        mine = [row for row in known if row["order"] == order]
        curve = sorted((row["batch"], row["images_per_s"]) for row in mine if row["sweep"] == "batch")
        if curve:
            axes[0].plot(*zip(*curve, strict=True), marker=".", label=order)
        curve = sorted((torch.Size(parse_grid(r["grid"])).numel(), r["seconds"]) for r in mine if r["sweep"] == "grid")
        if curve:
            axes[1].plot(*zip(*curve, strict=True), marker=".", label=order)
        for batch in sorted({row["batch"] for row in mine if row["sweep"] == "size"}):
            chosen = [row for row in mine if row["sweep"] == "size" and row["batch"] == batch]
            curve = sorted((sizes.index(row["size"]), row["seconds"]) for row in chosen)
            axes[2].plot(*zip(*curve, strict=True), marker=".", label=f"{order}, batch {batch}")
    axes[0].set(xlabel="batch", ylabel="images/s", xscale="log", yscale="log")
    axes[1].set(xlabel="tokens", ylabel="seconds per batch", xscale="log", yscale="log")
    axes[2].set(xlabel="size", ylabel="seconds per batch", yscale="log")
    axes[2].set_xticks(range(len(sizes)), sizes)
    for each in axes:
        each.grid(alpha=0.3, which="both")
        if each.lines:
            each.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["raster", "neighboring", "parallel-4"])
    parser.add_argument("--size", choices=SIZES, default="L", help="of the batch and grid sweeps")
    parser.add_argument("--grid", default="16x16", help="of the batch and size sweeps")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64, 128, 256, 512])
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["B", "L", "XL", "XXL"])
    parser.add_argument("--size-batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--grids", nargs="*", default=["8x8", "16x16", "24x24", "32x32", "48x48"])
    parser.add_argument("--grid-batch", type=int, default=16)
    parser.add_argument("--engine", choices=get_args(Engine), default="auto")
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no new row after this time")
    return parser.parse_args(arguments)


def _point(row: dict[str, Any]) -> Point:
    return Point(**{name: row[name] for name in Point.__dataclass_fields__})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    given = parse(arguments)
    with reported():
        begin, out = time.perf_counter(), Path(given.out)
        out.mkdir(parents=True, exist_ok=True)
        done = {_point(row): row for row in rows(out, "growth")}
        device = pick_device(given.device)
        ceilings = measure_ceilings(device, pick_dtype(given.dtype))
        for point in points(given):
            same = next((row for other, row in done.items() if replace(other, sweep=point.sweep) == point), None)
            if point in done:
                continue
            if same is not None:
                # Where sweeps meet, one measurement serves them all.
                add(out, "growth", same | asdict(point))
                continue
            if time.perf_counter() - begin > given.seconds:
                print("out of time: repeat the command to go on")
                break
            done[point] = take(point, given, ceilings, device)
            add(out, "growth", done[point])
        found = rows(out, "growth")
        (out / "growth.md").write_text(table(found))
        plot(found, out / "growth.png")
        print(table(found))


if __name__ == "__main__":
    main()
