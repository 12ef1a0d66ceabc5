"""Rows and settings of an output folder that several processes share and any of them may be killed in."""

import pytest

from benchmarks.measurements import add, check_same, rows
from vgen.errors import UserError


def test_half_a_row_costs_itself_only(tmp_path):
    assert rows(tmp_path, "scores") == []
    add(tmp_path, "scores", {"x": 1})
    with (tmp_path / "scores.jsonl").open("a") as file:
        file.write('{"x": 2')
    add(tmp_path, "scores", {"x": 3})
    add(tmp_path, "scores", {"x": 4})
    assert rows(tmp_path, "scores") == [{"x": 1}, {"x": 3}, {"x": 4}]


def test_settings_stay_and_may_come_later(tmp_path):
    path = tmp_path / "settings.json"
    check_same(tmp_path, {"steps": 5, "raster": None}, later=("raster",))
    first = path.stat().st_ino
    check_same(tmp_path, {"steps": 5, "raster": None}, later=("raster",))
    # Others read it meanwhile.
    assert path.stat().st_ino == first
    check_same(tmp_path, {"steps": 5, "raster": "a"}, later=("raster",))
    with pytest.raises(UserError, match="has other raster"):
        check_same(tmp_path, {"steps": 5, "raster": "b"}, later=("raster",))
    with pytest.raises(UserError, match="has other steps, scales;"):
        check_same(tmp_path, {"steps": 6, "scales": [1], "raster": "a"})
    assert [file.name for file in tmp_path.iterdir()] == ["settings.json"]
