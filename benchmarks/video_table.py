"""The results of benchmarks/compare_video.py as CSV, markdown and a plot."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write_table(folder: Path, rows: Mapping[str, Sequence[Row]], proxy: Mapping[str, float]) -> None:
    """Write video.csv (orders), decode.csv, video.md and video.png from the rows so far, and print the markdown.

    Args:
        folder: where to.
        rows: of the stages reference, score, speed and decode.
        proxy: test figures of the proxy network.
    """
    orders, sizes = _orders(rows), _decode(rows["decode"])
    for name, table in (("video.csv", orders), ("decode.csv", sizes)):
        if table:
            with (folder / name).open("w", newline="") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(key for row in table for key in row)))
                writer.writeheader()
                writer.writerows(table)
    lines = [*_proxy_line(proxy), *_reference_lines(rows["reference"]), *_order_lines(orders), *_decode_lines(sizes)]
    if not lines:
        print("nothing has been measured yet")
        return
    (folder / "video.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    if orders:
        _plot(orders, rows, folder / "video.png")


def _orders(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    speeds = {row["order"]: row for row in rows["speed"]}
    table = []
    for row in rows["score"]:
        if row["final"]:
            fast = speeds.get(row["order"], {})
            table.append(
                {
                    "order": row["order"],
                    "passes": fast.get("passes"),
                    "clips_per_s_tokens": fast.get("clips_per_s_tokens"),
                    "clips_per_s_pixels": fast.get("clips_per_s_pixels"),
                    **{key: row[key] for key in ("fd_proxy", "digit_accuracy", "steady", "scale", "temperature")},
                    "clips": row["clips"],
                }
            )
    return table


def _decode(rows: Sequence[Row]) -> list[Row]:
    """One row per grid and order: batch 1 and the fastest batch."""
    table = []
    for grid, order in dict.fromkeys((row["grid"], row["order"]) for row in rows):
        mine = [row for row in rows if (row["grid"], row["order"]) == (grid, order)]
        one = next((row for row in mine if row["batch"] == 1), None)
        best = max(mine, key=lambda row: row["images_per_s"])
        table.append(
            {
                "grid": grid,
                "order": order,
                "passes": best["passes"],
                "clips_per_s_batch_1": one and one["images_per_s"],
                "of_bound_batch_1": one and one["share"],
                "best_batch": best["batch"],
                "clips_per_s_best": best["images_per_s"],
                "of_bound_best": best["share"],
                "device": best["device"],
            }
        )
    return table


def _proxy_line(proxy: Mapping[str, float]) -> list[str]:
    if not proxy:
        return []
    return [
        f"Proxy network: {proxy['test_accuracy']:.1%} of held-out clips (scans never seen) recognised, centre "
        f"of the digit {proxy['test_centre_error_px']:.2f} px off. Distances over its features are not FVD.",
        "",
    ]


def _reference_lines(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["| clips | n | FD-proxy | digit accuracy | steady motion |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['what']} | {row['clips']} | {row['fd_proxy']:.3f} | {row['digit_accuracy']:.1%} | "
            f"{row['steady']:.1%} |"
        )
    for row in rows:
        if "psnr" in row:
            lines += [
                "",
                f"Tokenizer, clips of unseen scans in {'x'.join(map(str, row['tokens']))} tokens: PSNR "
                f"{row['psnr']:.2f} dB, rFD-proxy {row['rfd_proxy']:.3f}, {row['codes_used']:.1%} of the codes "
                f"used, perplexity {row['perplexity']:.0f}.",
            ]
    return [*lines, ""]


def _order_lines(table: Sequence[Row]) -> list[str]:
    if not table:
        return []
    lines = [
        "| order | passes | clips/s (tokens) | clips/s (pixels) | FD-proxy | digit accuracy | steady motion | scale | "
        "temperature |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        rates = [_number(row[f"clips_per_s_{kind}"]) for kind in ("tokens", "pixels")]
        lines.append(
            f"| {row['order']} | {_number(row['passes'])} | {rates[0]} | {rates[1]} | {row['fd_proxy']:.3f} | "
            f"{row['digit_accuracy']:.1%} | {row['steady']:.1%} | {row['scale']:g} | {row['temperature']:g} |"
        )
    return [*lines, ""]


def _decode_lines(table: Sequence[Row]) -> list[str]:
    if not table:
        return []
    lines = [
        "| grid | order | passes | clips/s, batch 1 | of bound | best clips/s | batch | of bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        one = row["of_bound_batch_1"]
        lines.append(
            f"| {row['grid']} | {row['order']} | {row['passes']} | {_number(row['clips_per_s_batch_1'])} | "
            f"{'' if one is None else f'{one:.0%}'} | {_number(row['clips_per_s_best'])} | {row['best_batch']} | "
            f"{row['of_bound_best']:.0%} |"
        )
    return [*lines, ""]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _plot(orders: Sequence[Row], rows: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Distance over passes, and the two shares beside those of real and reconstructed clips."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for row in orders:
        passes = row["passes"] or 0
        left.scatter(passes, row["fd_proxy"], zorder=3)
        left.annotate(row["order"], (passes, row["fd_proxy"]), fontsize=8, xytext=(4, 4), textcoords="offset points")
    for row in rows["reference"]:
        if row["what"] == "reconstructions":
            left.axhline(row["fd_proxy"], linestyle="--", linewidth=1, color="grey", label="reconstructions")
            left.legend(fontsize=7)
    left.set(xlabel="forward passes", ylabel="Frechet distance, proxy features", yscale="log")
    shown = [(row["what"], row) for row in rows["reference"] if row["what"] != "other real clips"]
    shown += [(row["order"], row) for row in orders]
    places = range(len(shown))
    for offset, key, label in ((-0.2, "digit_accuracy", "digit accuracy"), (0.2, "steady", "steady motion")):
        right.bar([place + offset for place in places], [row[key] for _, row in shown], 0.38, label=label)
    right.set_xticks(list(places), [name for name, _ in shown], rotation=20, ha="right", fontsize=7)
    right.set_ylim(0, 1.02)
    right.legend(fontsize=7, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both", axis="y")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
