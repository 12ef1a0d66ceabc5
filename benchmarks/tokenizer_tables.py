"""Tables and plots of benchmarks.compare_tokenizers from the rows that are there."""

import csv
from pathlib import Path
from typing import Any

from benchmarks.measurements import rows

Rows = list[dict[str, Any]]
NAMES = {
    "vq": "VQGAN 8x8",
    "titok_stage2": "TiTok, two-stage",
    "titok_single": "TiTok, single-stage",
    "flextok": "FlexTok",
}


def write(out: Path) -> None:
    """Write trainings.md, tokenizers.csv and .md, generators.csv and .md and lengths.png for what is known."""
    trained = trainings(out)
    if trained:
        _save(out / "trainings", trained, ["training", "steps", "budget_s", "images_per_s"], {"images_per_s": "{:.0f}"})
    tokenizers = rows(out, "reconstruction") + rows(out, "lengths")
    if tokenizers:
        table = [row | {"tokenizer": NAMES.get(row["tokenizer"], row["tokenizer"])} for row in tokenizers]
        columns = ["tokenizer", "tokens", "codes", "fd", "psnr", "codebook_usage", "perplexity", "parameters"]
        formats = {"fd": "{:.2f}", "psnr": "{:.2f}", "codebook_usage": "{:.1%}", "perplexity": "{:.0f}"}
        _save(out / "tokenizers", table, columns, formats)
    finals = [row for row in rows(out, "samples") if row["final"]]
    if finals:
        speeds = {row["plan"]: row for row in rows(out, "speed")}
        table = [row | speeds.get(row["plan"], {}) for row in finals]
        columns = ["plan", "tokens", "scale", "samples", "fd", "accuracy", "images_per_s", "tokens_only_per_s"]
        formats = {"scale": "{:g}", "fd": "{:.2f}", "accuracy": "{:.1%}"}
        _save(out / "generators", table, columns, formats | {name: "{:.0f}" for name in columns[-2:]})
    if lengths := sorted(rows(out, "lengths"), key=lambda row: row["tokens"]):
        plot(lengths, rows(out, "reconstruction"), finals, out / "lengths.png")


def trainings(out: Path) -> Rows:
    """Logged steps of every finished training, its time budget and its median speed."""
    found = []
    budgets = {row["task"]: row.get("budget_s") for row in rows(out, "tasks")}
    for metrics in sorted(out.glob("*/metrics.csv")):
        name = metrics.parent.name
        with metrics.open() as file:
            lines = list(csv.DictReader(file))
        speeds = sorted(float(line["images_per_s"]) for line in lines if line.get("images_per_s"))
        if speeds and (metrics.parent / "release").is_dir():
            middle = speeds[len(speeds) // 2]
            steps = max(int(line["step"]) for line in lines)
            found.append({"training": name, "steps": steps, "budget_s": budgets.get(name), "images_per_s": middle})
    return found


def _save(path: Path, table: Rows, columns: list[str], formats: dict[str, str]) -> None:
    """CSV with all digits, markdown with few."""
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table)
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in table:
        cells = ["" if row.get(name) is None else formats.get(name, "{}").format(row[name]) for name in columns]
        lines.append(f"| {' | '.join(cells)} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def plot(lengths: Rows, reconstructions: Rows, finals: Rows, path: Path) -> None:
    """FlexTok's distance and PSNR over the tokens kept, other tokenizers and generated samples as single points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for axes, measure in ((left, "fd"), (right, "psnr")):
        axes.plot([row["tokens"] for row in lengths], [row[measure] for row in lengths], "o-", label="FlexTok")
        for row in reconstructions:
            name = NAMES.get(row["tokenizer"], row["tokenizer"])
            axes.plot([row["tokens"]], [row[measure]], "s", label=name)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3, which="both")
    for row in finals:
        left.plot([row["tokens"]], [row["fd"]], "x", label=f"samples, {row['plan']}")
    left.set(xlabel="tokens", ylabel="Frechet distance", yscale="log")
    right.set(xlabel="tokens", ylabel="PSNR (dB)")
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
