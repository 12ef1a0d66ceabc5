"""Training in orders drawn per sample, and what a recipe takes from schedule and tokenizer."""

import pytest
import torch

from tests.training.helpers import composed
from vgen.schedules.rar import rar
from vgen.training.generator_module import GeneratorModule
from vgen.training.parts import complete_generator
from vgen.training.settings import resolve


class Stub:
    """What the order functions of the module need."""

    seed = 5
    plan = rar(grid=(3, 4), anneal_start=10, anneal_end=20)
    orders = GeneratorModule.orders
    training_orders = GeneratorModule.training_orders

    def __init__(self, step=0, epoch=0):
        self.trainer = type("Trainer", (), {"global_step": step})()
        self.epoch = epoch


def test_orders_depend_on_seed_epoch_and_image_only():
    index = torch.tensor([3, 8, 100])
    orders = Stub().training_orders(index)
    assert orders.shape == (3, 12)
    assert torch.equal(orders.sort(1).values, torch.arange(12).expand(3, -1))
    assert torch.equal(Stub().training_orders(index[1:2])[0], orders[1])
    assert not torch.equal(Stub(epoch=1).training_orders(index), orders)


def test_the_share_of_random_orders_falls_to_none():
    index = torch.arange(4000)
    plain = torch.arange(12)
    half = Stub(step=15).training_orders(index)
    share = 1 - (half == plain).all(1).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.03)
    assert Stub(step=20).training_orders(index) is None


def test_the_same_image_keeps_its_coin_while_the_share_falls():
    index = torch.arange(500)
    early, late = (Stub(step=step).training_orders(index) for step in (12, 18))
    plain = torch.arange(12)
    assert ((early == plain).all(1) <= (late == plain).all(1)).all()


@pytest.mark.parametrize(
    ("recipe", "facts"),
    [
        ("dar_l", {"codebook_dim": 8, "num_readouts": 1, "position_queries": False}),
        ("randar_l", {"position_queries": True, "directions": None}),
        ("nar_b", {"num_readouts": 2}),
        ("par_l", {"num_learned": 3}),
    ],
)
def test_recipes_take_what_they_need_from_their_parts(recipe, facts):
    settings = resolve(composed(f"experiment={recipe}", "data.path=/somewhere"))
    network = complete_generator(
        settings["generator"], settings["schedule"], vocab_size=64, grid=(4, 4), num_classes=7, codebook_dim=8
    )
    assert {name: network[name] for name in facts} == facts
    if "direction" in network["adaln"]:
        assert network["directions"] == [[0, 1], [1, 0], [1, -1], [-1, 1]]
