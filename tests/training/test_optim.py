import math

import pytest
import torch
from torch import nn

from vgen.errors import UserError
from vgen.training.optim import LrSchedule, adam, adamw, decay_groups, freeze_others, without_decay


def factors(**settings) -> list[float]:
    schedule = LrSchedule(**{"shape": "constant", "warmup": 0, "total": 10} | settings)
    return [schedule.factor(step) for step in range(12)]


def test_warmup_rises_linearly_and_never_starts_at_zero():
    assert factors(warmup=4)[:6] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_warmup_may_start_at_zero():
    assert factors(warmup=4, from_zero=True)[:6] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_falls_to_its_end_and_stays_there():
    values = factors(shape="cosine", warmup=2, end=0.1)
    assert values[2] == 1.0
    assert values[6] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert values[10:] == pytest.approx([0.1, 0.1])


def test_linear_falls_by_equal_amounts():
    assert factors(shape="linear", end=0.0)[::5] == pytest.approx([1.0, 0.5, 0.0])


def test_multistep_multiplies_at_milestones():
    values = factors(shape="multistep", milestones=(3, 6), gamma=0.1)
    assert [values[2], values[3], values[5], values[6]] == pytest.approx([1.0, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"shape": "cosin"}, "shape=cosin"),
        ({"milestones": (3,)}, "milestones"),
        ({"shape": "multistep", "milestones": (5, 3)}, "milestones"),
        ({"warmup": 11}, "warmup=11"),
        ({"shape": "cosine", "end": 2.0}, "end=2.0"),
    ],
)
def test_bad_settings_are_named(settings, name):
    with pytest.raises(UserError, match=name):
        factors(**settings)


def test_only_matrices_decay():
    network = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    network[1].weight.requires_grad_(False)
    matrices = {name for name, p in network.named_parameters() if p.ndim >= 2}
    optimizer = adamw(network.named_parameters(), matrices, lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(network[0].weight, before["0.weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(network[2].weight, before["2.weight"])
    assert torch.equal(network[1].weight, before["1.weight"])


def test_named_matrices_do_not_decay():
    network = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3))
    matrices = {name for name, p in network.named_parameters() if p.ndim >= 2}
    groups = decay_groups(network.named_parameters(), 0.5, without_decay(matrices, ["0."]))
    assert [id(p) for p in groups[0]["params"]] == [id(network[1].weight)]
    assert {id(p) for p in groups[1]["params"]} == {id(network[0].weight), id(network[1].bias)}


def test_only_the_named_parts_are_trained():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    freeze_others(network, ["1."])
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["1.weight", "1.bias"]
    with pytest.raises(UserError, match=r"2\..*the network's parts are 0, 1"):
        freeze_others(network, ["2."])


def test_adam_does_not_decay():
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    optimizer = adam(layer.named_parameters(), {"weight"}, lr=0.1, betas=(0.9, 0.95))
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert torch.equal(layer.weight, before)
