"""The comparison of orders at a tiny size: every stage, and going on where it stopped."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import compare_orders
from tests.evaluation.helpers import TinyExtractor, quadrant_pictures, save_script, save_tokenizer


def write_pictures(folder):
    """A few pictures of 12x12 in Hugging Face layout."""
    folder.mkdir()
    for split, count in (("train", 40), ("test", 12)):
        pictures, labels = quadrant_pictures(count, seed=count)
        rows = []
        for picture in pictures:
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "PNG")
            rows.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"image": rows, "label": labels.tolist()})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.slow
def test_every_stage_and_a_repeated_command(tmp_path, capsys):
    command = [
        *("--data", str(write_pictures(tmp_path / "data"))),
        *("--features", str(save_script(TinyExtractor(), tmp_path / "tiny.pt"))),
        *("--tokenizer", str(save_tokenizer(tmp_path / "tokenizer"))),
        *("--out", str(tmp_path / "out"), "--orders", "raster", "--steps", "2"),
        *("--scales", "1", "2", "--samples", "16", "--final", "24", "--batch-size", "12", "--set"),
        *("trainer=cpu", "task.batch_size=8", "task.compile=false", "task.lr_schedule.warmup=1", "every.validate=0"),
        *("generator.dim=16", "generator.depth=1", "generator.heads=2", "num_threads=1"),
    ]
    compare_orders.main(command)
    assert "trained in" in capsys.readouterr().out
    out = tmp_path / "out"
    table = list(csv.DictReader((out / "orders.csv").open()))
    assert [(row["plan"], row["passes"]) for row in table[:3]] == [
        ("raster", "36"),
        ("zipar-4", "28"),
        ("zipar-2", "20"),
    ]
    assert int(table[3]["passes"]) >= 24
    assert all(float(row["fd"]) > 0 and float(row["images_per_s"]) > 0 for row in table)
    assert (out / "orders.png").is_file()
    assert (out / "orders.md").read_text().count("\n") == 2 + len(table)

    rows = (out / "sweep.jsonl").read_text().splitlines()
    assert len(rows) >= 4 * 3
    # An interrupted sweep: the rows that are there are not made again.
    (out / "sweep.jsonl").write_text("\n".join(rows[:-2]) + "\n")
    compare_orders.main(command)
    assert "trained in" not in capsys.readouterr().out
    again = [json.loads(row) for row in (out / "sweep.jsonl").read_text().splitlines()]
    assert [(row["plan"], row["scale"], row["samples"]) for row in again] == [
        (row["plan"], row["scale"], row["samples"]) for row in map(json.loads, rows)
    ]
    assert [row["fd"] for row in again] == pytest.approx([json.loads(row)["fd"] for row in rows])

    with pytest.raises(SystemExit) as stop:
        compare_orders.main([*command[: command.index("2")], "3", *command[command.index("2") + 1 :]])
    assert stop.value.code == 2
    assert "has other steps" in capsys.readouterr().err
