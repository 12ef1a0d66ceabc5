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


def test_every_point_is_measured_once_and_a_stopped_run_goes_on(tmp_path, capsys):
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
    assert all(row["passes"] == 2 * int(row["grid"][0]) - 1 and row["images_per_s"] > 0 for row in rows)
    assert (tmp_path / "growth.png").stat().st_size > 1000
    assert (tmp_path / "growth.md").read_text().count("neighboring") == 5
