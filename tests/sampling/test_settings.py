import json
import math

import pytest

from tests.paths import GOLDEN
from vgen.errors import UserError
from vgen.sampling.settings import Guidance, Sampling


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_sampling_out_of_range_names_its_key(options, key):
    with pytest.raises(UserError, match=f"sampling.{key}"):
        Sampling(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": -0.1},
        {"scale": float("inf")},
        {"schedule": "cosine"},
        {"power": -1.0},
        {"start": 5, "end": 4},
        {"start": -1},
        {"convention": "two-plus"},
        {"along": "time"},
        {"counted": "during"},
    ],
)
def test_guidance_out_of_range_names_its_key(options):
    with pytest.raises(UserError, match=r"sampling\.guidance"):
        Guidance(**options)


def test_weights_of_the_three_schedules():
    assert Guidance(scale=3.0).weight(0, 16) == 3.0
    assert Guidance(scale=3.0, schedule="linear").weight(4, 16) == 1.5
    assert Guidance(scale=3.0, schedule="linear").weight(0, 16) == 1.0
    cosine = Guidance(scale=3.0, schedule="power-cosine", power=2.0)
    assert cosine.weight(0, 16) == 1.0
    assert cosine.weight(8, 16) == pytest.approx(1 + 2 * (1 - 2**-0.5) / 2)
    assert Guidance(scale=3.0, schedule="power-cosine", power=0.0).weight(0, 16) == 3.0


def test_the_one_plus_convention_counts_one_less():
    assert Guidance(scale=3.0, convention="one-plus").weight(0, 8) == 4.0
    linear = Guidance(scale=4.0, schedule="linear", convention="one-plus", initial=0.0)
    assert [linear.weight(k, 8) for k in (0, 2, 8)] == [1.0, 2.0, 5.0]
    assert Guidance(scale=3.0, convention="one-plus", start=2).weight(1, 8) == 1.0


def test_interval_counts_decided_tokens():
    guidance = Guidance(scale=2.0, start=2, end=5)
    assert [guidance.weight(k, 8) for k in range(8)] == [1, 1, 2, 2, 2, 1, 1, 1]


def test_power_cosine_equals_the_published_table():
    table = json.loads((GOLDEN / "dar" / "guidance_power_cosine.json").read_text())
    checked = 0
    for entry in table["cases"]:
        guidance = Guidance(scale=entry["scale"], schedule="power-cosine", power=entry["power"])
        for t, value in enumerate(entry["values"]):
            assert guidance.weight(t, len(entry["values"])) == pytest.approx(value, abs=1e-4)
            checked += 1
    assert checked


def test_maskgen_counts_the_pass_itself_and_adds_the_guidance_to_the_condition():
    """s_r = 1 + (s - 1) (1 - cos(pi r)) / 2 with r = (pass + 1) / passes; logits = cond + (cond - uncond) s_r."""
    guidance = Guidance(scale=12.0, schedule="power-cosine", convention="one-plus", along="passes", counted="after")
    assert guidance.weight(16, 16) == pytest.approx(13.0)
    assert guidance.weight(8, 16) == pytest.approx(1 + 1 + 11 / 2)
    assert guidance.weight(1, 16) == pytest.approx(2 + 11 * (1 - math.cos(math.pi / 16)) / 2)
