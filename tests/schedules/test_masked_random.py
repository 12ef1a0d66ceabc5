"""Masked generation in an order of chance: counts, orders per sample, what training hides."""

import math
from itertools import pairwise

import pytest
import torch

from tests.generators.helpers import tiny_generator
from vgen.errors import UserError
from vgen.generators.transformer import Transformer
from vgen.sampling.decode import decode
from vgen.sampling.settings import Sampling
from vgen.schedules.masked import masked
from vgen.schedules.masked_random import known_after, masked_random
from vgen.schedules.masking import Masking

VOCAB = 23


def mar_counts(tokens, steps):
    """Tokens still masked after each pass by MAR's rule (sheet continuous_and_causal_tokenizers, Decode)."""
    masked_now, left = tokens, []
    for index in range(steps):
        wanted = math.floor(tokens * math.cos(math.pi / 2 * (index + 1) / steps))
        masked_now = max(1, min(masked_now - 1, wanted)) if index < steps - 1 else 0
        left.append(masked_now)
    return left


@pytest.mark.parametrize(("tokens", "steps"), [(32, 32), (256, 64), (256, 256), (32, 16), (16, 5), (1, 1)])
def test_counts_are_those_of_mar(tokens, steps):
    known = known_after(tokens, steps, "cosine")
    assert known[0] == 0
    assert [tokens - count for count in known[1:]] == mar_counts(tokens, steps)


@pytest.mark.parametrize("ratio", ["arccos", "cosine", "linear", "square", "root"])
@pytest.mark.parametrize("steps", [1, 3, 19, 20])
def test_every_pass_decides_at_least_one_token(ratio, steps):
    known = known_after(20, steps, ratio)
    assert known[-1] == 20
    assert all(later > earlier for earlier, later in pairwise(known))


def test_every_sample_has_an_order_of_its_own_and_keeps_what_it_knows():
    plan = masked_random(grid=(3, 4), steps=5)
    generator = tiny_generator(plan, vocab_size=VOCAB, norm="layer", rope="none", positions="own", bias=True)
    places, labels = [], torch.tensor([0, 3, 1])

    def watch(_, ids):
        places.append(ids.clone())

    request = {"sampling": Sampling(seed=1), "sample_index": torch.arange(3)}
    ids = decode(generator, plan, labels, watch=watch, **request)
    known = torch.stack(places) >= 0
    assert known.sum(2).T.tolist() == [[*plan.decided_before()[1:], 12]] * 3
    for before, after in pairwise(places):
        assert torch.equal(before[before >= 0], after[before >= 0])
    assert not torch.equal(known[1, 0], known[1, 1]), "one order for all"
    assert (ids < VOCAB).all()
    alone = decode(generator, plan, labels[1:2], sampling=Sampling(seed=1), sample_index=torch.tensor([1]))
    assert torch.equal(alone[0], ids[1])


def test_given_tokens_are_seen_from_the_first_pass_and_kept():
    plan = masked_random(grid=(3, 4), steps=4)
    generator = tiny_generator(plan, vocab_size=VOCAB, norm="layer", rope="none", positions="own", bias=True)
    ids, fed = torch.randint(VOCAB, (2, 12)), []
    known = torch.rand(2, 12) < 0.4

    def step(tokens, *arguments, **more):
        fed.append((tokens[:, :12] != VOCAB).sum(1))
        return Transformer.step(generator, tokens, *arguments, **more)

    generator.step = step
    out = decode(
        generator,
        plan,
        torch.tensor([0, 1]),
        known_ids=ids,
        known=known,
        sampling=Sampling(),
        sample_index=torch.arange(2),
    )
    assert torch.equal(out[known], ids[known])
    assert torch.equal(fed[0], known.sum(1))


def test_it_teaches_what_the_masked_order_teaches():
    plan, other = masked_random(grid=(3, 4), steps=5), masked(grid=(3, 4), steps=2)
    assert plan.same_training(other)
    assert not plan.needs_cache


def test_training_rounds_the_number_of_hidden_tokens_up():
    progress, draws = torch.tensor([0.9]), torch.rand(1, 10)
    share = math.acos(0.9) / (math.pi / 2)
    assert int(Masking("arccos").hidden(progress, draws).sum()) == round(10 * share) == 3
    assert int(Masking("arccos", rounding="up").hidden(torch.tensor([0.95]), draws).sum()) == 3
    assert int(Masking("arccos").hidden(torch.tensor([0.95]), draws).sum()) == 2


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 13}, {"ratio": "steep"}, {"training_ratio": "steep"}])
def test_options_out_of_range_are_named(options):
    with pytest.raises(UserError, match=r"schedule\."):
        masked_random(grid=(3, 4), **options)
