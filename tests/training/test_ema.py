import pytest
import torch
from torch import nn

from vgen.training.ema import EMA


def parameter(*values: float) -> dict[str, nn.Parameter]:
    return {"w": nn.Parameter(torch.tensor(values))}


def test_average_is_the_weighted_sum_of_history():
    weights = parameter(1.0, -1.0)
    ema = EMA(weights, decay=0.75, warmup=False)
    history = [torch.tensor([1.0, -1.0])]
    for step in range(3):
        history.append(torch.tensor([float(step), 2.0]))
        weights["w"].data.copy_(history[-1])
        ema.update()
    expected = history[0] * 0.75**3 + sum(0.25 * 0.75 ** (2 - i) * history[i + 1] for i in range(3))
    with ema.swapped():
        torch.testing.assert_close(weights["w"].data, expected)


def test_warmup_copies_first_and_then_grows_slow():
    weights = parameter(0.0)
    ema = EMA(weights, decay=0.999, warmup=True)
    weights["w"].data.fill_(1.0)
    ema.update()
    with ema.swapped():
        assert weights["w"].item() == pytest.approx(1.0)
    weights["w"].data.fill_(2.0)
    ema.update()
    with ema.swapped():
        assert weights["w"].item() == pytest.approx(2.0 - 2 / 11)
    assert ema.decay_at(10**6) == 0.999


def test_own_weights_return_after_an_error_inside():
    weights = parameter(3.0)
    ema = EMA(weights, decay=0.5, warmup=False)
    weights["w"].data.fill_(5.0)

    def fail_inside():
        with ema.swapped():
            assert weights["w"].item() == 3.0
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert weights["w"].item() == 5.0


def test_averages_bfloat16_weights_in_float32():
    weights = {"w": nn.Parameter(torch.ones(1, dtype=torch.bfloat16))}
    ema = EMA(weights, decay=0.9999, warmup=False)
    weights["w"].data.fill_(2.0)
    for _ in range(100):
        ema.update()
    assert ema.state_dict()["average"]["w"].item() == pytest.approx(2 - 0.9999**100, abs=1e-5)


def test_state_survives_a_round_trip():
    first, second = parameter(1.0), parameter(1.0)
    a, b = EMA(first, decay=0.9, warmup=True), EMA(second, decay=0.9, warmup=True)
    first["w"].data.fill_(2.0)
    a.update()
    b.load_state_dict(a.state_dict())
    second["w"].data.fill_(2.0)
    a.update()
    b.update()
    assert torch.equal(a.state_dict()["average"]["w"], b.state_dict()["average"]["w"])
    assert b.updates == 2
