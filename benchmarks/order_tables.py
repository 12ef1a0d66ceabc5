"""Table and plot of benchmarks.compare_orders from the rows that are there."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def best_rows(rows: Rows, *, samples: int, finals: Sequence[int]) -> dict[str, dict[str, Any]]:
    """The row that stands for each plan: at its best scale, all with the same number of samples.

    That number is the largest that all plans scored so far have, since the distance falls with it.

    Args:
        rows: measurements of the sweep.
        samples: at each scale.
        finals: larger numbers at the best scale, rising.
    """
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["samples"] == samples and row["fd"] < best.get(row["plan"], {"fd": math.inf})["fd"]:
            best[row["plan"]] = row
    for final in finals:
        more = {r["plan"]: r for r in rows if r["samples"] == final and r["scale"] == best[r["plan"]]["scale"]}
        if more.keys() < best.keys():
            break
        best = more
    return best


def write(
    out: Path,
    plans: Sequence[tuple[str, str]],
    sweep: Rows,
    speed: Rows,
    *,
    samples: int,
    finals: Sequence[int],
) -> None:
    """Write orders.csv, orders.md and orders.png.

    Args:
        out: folder.
        plans: (label, training) of every plan, in the order of the table.
        sweep: distances and accuracies at guidance scales.
        speed: passes and images/s.
        samples: at each scale.
        finals: larger numbers at the best scale, rising.
    """
    sweep = [row for row in sweep if row["plan"] in {label for label, _ in plans}]
    best, speeds = best_rows(sweep, samples=samples, finals=finals), {row["plan"]: row for row in speed}
    table = []
    for label, training in plans:
        if label in best:
            row, fast = best[label], speeds.get(label, {})
            tried = [r["scale"] for r in sweep if r["plan"] == label]
            table.append(
                {
                    "plan": label,
                    "trained": training,
                    "passes": fast.get("passes"),
                    "images_per_s": fast.get("images_per_s"),
                    "fd": row["fd"],
                    "accuracy": row["accuracy"],
                    "scale": row["scale"],
                    "samples": row["samples"],
                    "scale_is_edge": row["scale"] in (min(tried), max(tried)),
                }
            )
    if not table:
        print("no plan has been scored yet")
        return
    with (out / "orders.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    lines = ["| plan | trained as | passes | images/s | FD | accuracy | scale | samples |", "|" + "---|" * 8]
    for row in table:
        passes = "" if row["passes"] is None else row["passes"]
        rate = "" if row["images_per_s"] is None else f"{row['images_per_s']:.0f}"
        scale = f"{row['scale']:g}{' (edge)' if row['scale_is_edge'] else ''}"
        lines.append(
            f"| {row['plan']} | {row['trained']} | {passes} | {rate} | {row['fd']:.2f} | {row['accuracy']:.1%} | "
            f"{scale} | {row['samples']} |"
        )
    (out / "orders.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    plot(table, sweep, samples, out / "orders.png")


def plot(table: Rows, sweep: Rows, samples: int, path: Path) -> None:
    """Distance over guidance scale, and distance over passes, one colour per plan."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for row in table:
        points = sorted((r["scale"], r["fd"]) for r in sweep if r["plan"] == row["plan"] and r["samples"] == samples)
        (line,) = left.plot(*zip(*points, strict=True), marker=".", label=row["plan"])
        passes = row["passes"] or 0
        right.scatter(passes, row["fd"], color=line.get_color(), zorder=3)
        right.annotate(row["plan"], (passes, row["fd"]), fontsize=8, xytext=(4, 4), textcoords="offset points")
    right.margins(x=0.2)
    left.set(xlabel="guidance scale", ylabel=f"Frechet distance, {samples} samples", yscale="log")
    right.set(
        xlabel="forward passes",
        ylabel=f"Frechet distance at the best scale, {table[0]['samples']} samples",
        yscale="log",
    )
    left.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        # Distances often span less than a decade, where powers of ten tell little.
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter("{x:g}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
