"""A condition made of tokens is seen, in every order of frame prediction; fixed and shortened positions."""

import pytest
import torch

from vgen.errors import UserError
from vgen.generators.conditioning import TokenCondition
from vgen.generators.transformer import Transformer
from vgen.layers.sincos import sincos_1d
from vgen.sampling.decode import decode
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.neighboring import neighboring
from vgen.schedules.parallel import parallel
from vgen.schedules.raster import raster

GRID, TOKENS, VOCABULARY = (2, 4, 4), 32, 11
PLACED = {"rope": "none", "positions": "own"}


def predictor(plan, *, droppable=False, **options):
    torch.manual_seed(0)
    generator = Transformer(
        vocab_size=VOCABULARY,
        grid=plan.grid,
        condition=TokenCondition(num_tokens=plan.num_condition - 1, dim=32, droppable=droppable),
        num_readouts=plan.num_heads,
        num_learned=plan.num_learned,
        **{"dim": 32, "depth": 2, "heads": 2, "ffn_multiple_of": 16} | PLACED | options,
    )
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return generator.eval()


@pytest.fixture(params=[raster, neighboring, parallel], ids=lambda schedule: schedule.__name__)
def plan(request):
    return request.param(grid=GRID, num_condition=TOKENS + 1)


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(VOCABULARY, (2, TOKENS)), torch.randint(VOCABULARY, (2, TOKENS))


def test_every_token_of_the_condition_is_seen_by_every_token(plan, ids):
    generator = predictor(plan)
    tokens, condition = ids
    logits = generator.logits(tokens, condition, plan)
    for place in range(TOKENS):
        other = condition.clone()
        other[:, place] = (other[:, place] + 1) % VOCABULARY
        changed = (generator.logits(tokens, other, plan) - logits).abs().amax(-1)
        assert changed.min() > 1e-4


def test_the_order_of_the_condition_is_seen(plan, ids):
    generator = predictor(plan)
    tokens, condition = ids
    changed = generator.logits(tokens, condition.flip(1), plan) - generator.logits(tokens, condition, plan)
    assert changed.abs().amax(-1).min() > 1e-4


def test_decoding_sees_what_training_saw(plan, ids):
    generator = predictor(plan)
    _, condition = ids
    drawn = decode(generator, plan, condition, sampling=Sampling(greedy=True), sample_index=torch.arange(2))
    assert torch.equal(generator.logits(drawn, condition, plan).argmax(-1), drawn)


def test_a_condition_can_be_dropped_only_if_that_was_learned(plan, ids):
    _, condition = ids
    guided = Sampling(greedy=True, guidance=Guidance(scale=2.0))
    with pytest.raises(UserError, match="no null condition"):
        decode(predictor(plan), plan, condition, sampling=guided, sample_index=torch.arange(2))
    generator = predictor(plan, droppable=True)
    drop = torch.ones(2, dtype=torch.bool)
    one, two = (generator.embed_condition(c, drop) for c in (condition, condition.flip(1)))
    assert torch.equal(one, two)
    decode(generator, plan, condition, sampling=guided, sample_index=torch.arange(2))


@pytest.mark.parametrize("options", [{"positions": "none"}, {"rope": "own"}])
def test_conditions_without_an_order_or_with_zeroed_keys_are_refused(options):
    with pytest.raises(UserError, match="a condition of tokens"):
        predictor(raster(grid=GRID, num_condition=TOKENS + 1), **options)


def test_rotated_tokens_beside_an_unrotated_condition_work(ids):
    plan = raster(grid=GRID, num_condition=TOKENS + 1)
    tokens, condition = ids
    generator = predictor(plan, rope="own", rope_placeless="identity")
    changed = generator.logits(tokens, condition.flip(1), plan) - generator.logits(tokens, condition, plan)
    assert changed.abs().amax(-1).min() > 1e-4


def test_without_a_last_position_its_token_cannot_be_fed():
    plan = raster(grid=(6,), num_condition=2)
    generator = predictor(plan, last_position=False)
    assert generator.places.own.weight.shape == (7, 32)
    generator.check_plan(plan)
    alternating = parallel(grid=(2, 3), regions=[2, 1], num_condition=2)
    flat = predictor(alternating, last_position=False)
    flat.check_plan(alternating)
    feeding_last = type(plan)(**{**vars_of(plan), "order": plan.order.flip(0)})
    with pytest.raises(UserError, match="feeds the last token"):
        generator.check_plan(feeding_last)


def vars_of(plan):
    return {name: value for name, value in vars(plan).items() if not name.startswith("_")}


def test_fixed_positions_are_a_table_over_condition_and_grid():
    plan = raster(grid=(6,), num_condition=3)
    generator = predictor(plan, positions="sincos")
    assert torch.equal(generator.places.own.weight, sincos_1d(32, torch.arange(9)).float())
    assert "places.own.weight" in generator.state_dict()
    assert not any(name.startswith("places") for name, _ in generator.named_parameters())
