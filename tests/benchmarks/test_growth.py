"""The growth table at tiny sizes."""

import json

from benchmarks import growth

WORDS = [
    "--size",
    "tiny",
    "--grid",
    "4x4",
    "--batches",
    "1",
    "2",
    "--sizes",
    "tiny",
    "--size-batches",
    "1",
    "--grids",
    "2x2",
    "4x4",
    "--grid-batch",
    "2",
    "--vocab",
    "50",
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--orders",
    "neighboring",
    "--repeats",
    "1",
]


def test_every_point_is_measured_once_and_a_stopped_run_goes_on(tmp_path, capsys, monkeypatch):
    measured, take = [], growth.take
    monkeypatch.setattr(growth, "take", lambda point, *given: measured.append(point) or take(point, *given))
    growth.main([*WORDS, "--out", str(tmp_path), "--seconds", "0"])
    assert "repeat the command" in capsys.readouterr().out
    growth.main([*WORDS, "--out", str(tmp_path)])
    first = (tmp_path / "growth.jsonl").read_text()
    growth.main([*WORDS, "--out", str(tmp_path)])
    assert (tmp_path / "growth.jsonl").read_text() == first
    rows = [json.loads(line) for line in first.splitlines()]
    assert [(row["sweep"], row["grid"], row["batch"]) for row in rows] == [
        ("batch", "4x4", 1),
        ("batch", "4x4", 2),
        ("size", "4x4", 1),
        ("grid", "2x2", 2),
        ("grid", "4x4", 2),
    ]
    # Where sweeps meet there is one measurement: batches 1 and 2 on 4x4 are also the size and a grid.
    assert [(point.grid, point.batch) for point in measured] == [("4x4", 1), ("4x4", 2), ("2x2", 2)]
    assert rows[2]["seconds"] == rows[0]["seconds"]
    assert rows[4]["seconds"] == rows[1]["seconds"]
    assert all(row["passes"] == 2 * int(row["grid"][0]) - 1 and row["images_per_s"] > 0 for row in rows)
    assert (tmp_path / "growth.png").stat().st_size > 1000
    assert (tmp_path / "growth.md").read_text().count("neighboring") == 5
