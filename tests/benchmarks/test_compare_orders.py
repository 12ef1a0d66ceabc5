"""The comparison of orders at a tiny size: every stage, and going on where it stopped."""

import csv
import io
import json
from contextlib import ExitStack

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import compare_orders
from benchmarks.order_tables import best_rows
from benchmarks.sweep_queue import Measurement, claim, next_measurement
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


def swept(plans, fd, *, scales=(1.0, 2.0), finals=(24, 32), rows=()):
    """Measurements of a sweep whose distances are a function of plan and scale."""
    rows, made = list(rows), []
    while (todo := next_measurement(plans, rows, scales=scales, samples=16, finals=finals)) is not None:
        made.append(todo)
        rows.append(vars(todo) | {"fd": fd(todo.plan, todo.scale)})
    return made


def test_a_sweep_goes_through_the_scales_before_the_plans():
    best = {"a": 1.0, "b": 4.0, "c": 100.0}
    made = swept("abc", lambda plan, scale: abs(scale - best[plan]))
    expected = [(plan, scale, 16) for scale in (1.0, 2.0) for plan in "abc"]
    # Only plans whose best scale is the largest go on, up to the end of all scales.
    expected += [("b", 3.0, 16), ("c", 3.0, 16), ("b", 4.5, 16), ("c", 4.5, 16), ("b", 6.75, 16), ("c", 6.75, 16)]
    expected += [("c", 10.125, 16), ("c", 15.1875, 16), ("c", 22.78125, 16)]
    expected += [("a", 1.0, n) if p == "a" else (p, 4.5 if p == "b" else 22.78125, n) for n in (24, 32) for p in "abc"]
    assert made == [Measurement(*row) for row in expected]


def test_a_sweep_goes_on_below_where_the_smallest_scale_is_best():
    best = {"a": 3.0, "b": 1.0, "c": 4.0}
    made = swept("abc", lambda plan, scale: abs(scale - best[plan]), scales=(4.5, 6.75), finals=())
    assert [row.scale for row in made if row.plan == "a"] == [4.5, 6.75, 3.0, 2.0]
    assert [row.scale for row in made if row.plan == "b"] == pytest.approx([4.5, 6.75, 3.0, 2.0, 4 / 3, 1.0])
    assert [row.scale for row in made if row.plan == "c"] == [4.5, 6.75, 3.0]


def test_the_table_compares_equal_numbers_of_samples():
    def row(plan, scale, samples, fd):
        return {"plan": plan, "scale": scale, "samples": samples, "fd": fd}

    rows = [row("a", 1, 16, 5.0), row("a", 2, 16, 4.0), row("b", 1, 16, 3.0), row("a", 2, 24, 3.5)]
    assert best_rows(rows, samples=16, finals=[24, 32]) == {"a": rows[1], "b": rows[2]}
    rows += [row("b", 1, 24, 2.5), row("b", 1, 32, 2.4)]
    assert best_rows(rows, samples=16, finals=[24, 32]) == {"a": rows[3], "b": rows[4]}


def test_a_sweep_that_stopped_anywhere_goes_on_there():
    def fd(plan, scale):
        return abs(scale - ord(plan) + 94)

    whole = swept("abc", fd)
    for stop in range(len(whole)):
        rows = [vars(row) | {"fd": fd(row.plan, row.scale)} for row in whole[:stop]]
        assert swept("abc", fd, rows=rows) == whole[stop:]


def test_a_plan_has_one_owner(tmp_path):
    with ExitStack() as first, ExitStack() as second:
        assert claim(tmp_path / "claims" / "a", first)
        assert not claim(tmp_path / "claims" / "a", second)
        assert claim(tmp_path / "claims" / "b", second)
        first.close()
        assert claim(tmp_path / "claims" / "a", second)


@pytest.mark.slow
def test_every_stage_and_a_repeated_command(tmp_path, capsys):
    command = [
        *("--data", str(write_pictures(tmp_path / "data"))),
        *("--features", str(save_script(TinyExtractor(), tmp_path / "tiny.pt"))),
        *("--tokenizer", str(save_tokenizer(tmp_path / "tokenizer"))),
        *("--out", str(tmp_path / "out"), "--orders", "raster", "--steps", "2"),
        *("--scales", "1", "2", "--samples", "16", "--final", "24", "32", "--batch-size", "12", "--set"),
        *("trainer=cpu", "task.batch_size=8", "task.compile=false", "task.lr_schedule.warmup=1", "every.validate=0"),
        *("generator.dim=16", "generator.depth=1", "generator.heads=2", "num_threads=1"),
    ]
    compare_orders.main(command)
    assert "raster: " in capsys.readouterr().out
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
    assert {row["samples"] for row in table} == {"32"}

    rows = [json.loads(row) for row in (out / "sweep.jsonl").read_text().splitlines()]
    keys = [(row["plan"], row["scale"], row["samples"]) for row in rows]
    plans = ["raster", "zipar-4", "zipar-2", "zipar-2-adaptive"]
    assert keys[:8] == [(plan, scale, 16) for scale in (1, 2) for plan in plans]
    assert [key[::2] for key in keys[-8:]] == [(plan, samples) for samples in (24, 32) for plan in plans]
    # An interrupted sweep goes on in the same order, without the rows that are there.
    kept = "".join(json.dumps(row) + "\n" for row in rows[:6])
    (out / "sweep.jsonl").write_text(kept)
    compare_orders.main(command)
    assert "raster: " not in capsys.readouterr().out
    again = [json.loads(row) for row in (out / "sweep.jsonl").read_text().splitlines()]
    assert [(row["plan"], row["scale"], row["samples"]) for row in again] == keys
    assert [row["fd"] for row in again] == pytest.approx([row["fd"] for row in rows])
    # Two processes make the same rows, each of them once; a plan that another process has is left to it.
    (out / "sweep.jsonl").write_text(kept)
    with ExitStack() as held:
        assert claim(out / "claims" / "zipar-2", held)
        compare_orders.main([*command, "--only", "sweep", "final", "--scorers", "2"])
    shared = [json.loads(row) for row in (out / "sweep.jsonl").read_text().splitlines()]
    wanted = [row for row, key in zip(rows, keys, strict=True) if row in rows[:6] or key[0] != "zipar-2"]
    assert sorted((row["plan"], row["scale"], row["samples"]) for row in shared) == sorted(
        (row["plan"], row["scale"], row["samples"]) for row in wanted
    )

    with pytest.raises(SystemExit) as stop:
        compare_orders.main([*command[: command.index("2")], "3", *command[command.index("2") + 1 :]])
    assert stop.value.code == 2
    assert "has other steps" in capsys.readouterr().err
