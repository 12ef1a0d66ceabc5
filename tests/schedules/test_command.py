"""python -m vgen.schedules, and its pictures."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.schedules.helpers import ORDERS
from vgen.schedules.__main__ import contexts, example_of, main
from vgen.schedules.catalog import available, load_plan


@pytest.mark.parametrize("name", ORDERS)
def test_json_holds_the_order(name, capsys):
    assert main([name, "--grid", "4x4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = example_of(load_plan(name, (4, 4), {}))
    assert (found["name"], found["grid"], found["passes"]) == (name, [4, 4], len(plan.forwards))
    assert sorted(position for step in found["steps"] for position in step) == list(range(16))
    assert found["steps"] == [plan.order[forward.targets].tolist() for forward in plan.forwards]


@pytest.mark.parametrize("name", ORDERS)
def test_text_states_the_passes(name, capsys):
    assert main([name, "--grid", "8x16"]) == 0
    assert f"{len(load_plan(name, (8, 16), {}).forwards)} for 128 tokens" in capsys.readouterr().out


def test_orders_that_are_drawn_or_adapt_say_so(capsys):
    assert main(["randar", "--grid", "4x4"]) == 0
    assert "drawn for every sample" in capsys.readouterr().out
    assert main(["zipar", "window=2", "adaptive=true", "--grid", "4x4"]) == 0
    assert "at least 14 for 16 tokens" in capsys.readouterr().out


def test_a_schedule_that_breaks_the_contract_is_named(monkeypatch, capsys):
    plan = load_plan("raster", (4, 4), {})
    monkeypatch.setattr("vgen.schedules.__main__.load_plan", lambda *_: replace(plan, forwards=plan.forwards[:-1]))
    assert main(["raster", "--grid", "4x4"]) == 2
    assert "schedule 'raster' breaks the contract of plans" in capsys.readouterr().err


def test_options_stand_before_or_after_flags(capsys):
    for arguments in (
        ["zipar", "window=3", "--grid", "6x6", "--json"],
        ["zipar", "--grid", "6x6", "--json", "window=3"],
    ):
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["passes"] == 2 * 6 + 4 * 3
    assert main(["parallel", "--grid", "2x4x6", "--json", "regions=[2,3]"]) == 0
    assert json.loads(capsys.readouterr().out)["passes"] == 6 - 1 + 48 // 6


def test_context_counts_the_known_tokens_a_prediction_sees():
    assert [seen.tolist() for seen in contexts(load_plan("raster", (2, 2), {}))] == [[0], [1], [2], [3]]
    assert [seen.tolist() for seen in contexts(load_plan("neighboring", (2, 2), {}))] == [[0], [1, 1], [3]]
    # Pass 6 starts row 2 from a stand-in: both queries see the six tokens fed so far.
    seen = contexts(load_plan("zipar", (4, 4), {"window": 2}))
    assert seen[6].tolist() == [6, 6]
    assert torch.cat(seen).shape == (16,)


def test_help_lists_the_orders(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in available())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "choose one of"),
        (["raster", "--grid", "4y4"], "16x16"),
        (["zipar", "windw=3"], "it has adaptive, cache, num_condition, overlap_first_row, window"),
        (["zipar", "window"], "key=value"),
        (["zipar", "window=["], "YAML"),
        (["zipar", "window=0"], "window=0"),
        (["zipar", "window=wide"], "cannot be built"),
        (["parallel", "--grid", "5x5"], "does not divide"),
        (["diagonal", "--grid", "9"], "height and width"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_picture_is_coloured_by_pass(tmp_path, capsys):
    path = tmp_path / "order.png"
    assert main(["neighboring", "--grid", "5x7", "--picture", str(path)]) == 0
    image = Image.open(path).convert("RGB")
    corner = 8 + 2
    assert image.getpixel((corner + 28, corner)) == image.getpixel((corner, corner + 28))
    assert image.getpixel((corner, corner)) != image.getpixel((corner + 28, corner))
    video = tmp_path / "video.png"
    assert main(["neighboring", "--grid", "3x5x7", "--picture", str(video)]) == 0
    assert Image.open(video).width > 3 * (image.width - 16)


def test_an_animation_has_a_frame_per_pass(tmp_path, capsys):
    path = tmp_path / "order.gif"
    assert main(["parallel", "--grid", "4x4", "--picture", str(path)]) == 0
    with Image.open(path) as image:
        assert image.n_frames == 7
        image.seek(0)
        first = image.convert("RGB").getpixel((8 + 3 * 28 + 4, 8 + 4))
        image.seek(6)
        assert image.convert("RGB").getpixel((8 + 3 * 28 + 4, 8 + 4)) != first


@pytest.mark.parametrize("name", ["no/folder/order.png", "order.unknown"])
def test_a_picture_that_cannot_be_written(name, tmp_path, capsys):
    assert main(["raster", "--grid", "2x2", "--picture", str(tmp_path / name)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_module_runs():
    run = subprocess.run(
        [sys.executable, "-m", "vgen.schedules", "raster", "--grid", "2x3", "--json"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["steps"] == [[0], [1], [2], [3], [4], [5]]
