"""Orders drawn per sample: RAR and RandAR."""

import pytest
import torch

from tests.generators.helpers import tiny_generator
from tests.schedules.test_every_order import VOCAB, traced_decode
from vgen.errors import UserError
from vgen.sampling.decode import decode, decoding_order
from vgen.sampling.settings import Sampling
from vgen.schedules.check import check_plan
from vgen.schedules.randar import group_sizes, randar
from vgen.schedules.rar import rar
from vgen.schedules.raster import raster
from vgen.schedules.scans import SCANS


def test_published_pass_counts():
    assert len(randar(grid=(16, 16), steps=88).forwards) == 88
    assert len(randar(grid=(16, 16)).forwards) == 256
    assert group_sizes(256, 88)[:32] == [1] * 24 + [2] * 6 + [3, 2]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12, 35, 36])
def test_any_number_of_steps_decides_every_token_once(steps):
    plan = randar(grid=(4, 9), steps=steps)
    assert len(plan.forwards) == max(2, steps)
    check_plan(plan)
    assert plan.exact == (steps == 36)


def test_the_cache_ends_in_the_training_layout_whatever_the_group_sizes():
    generator = tiny_generator(randar(grid=(3, 4)), vocab_size=VOCAB)
    labels = torch.tensor([0, 3])
    order = torch.rand(2, 12).argsort(1)
    ids = torch.randint(VOCAB, (2, 12))
    caches = []
    for steps in (None, 5):
        plan = randar(grid=(3, 4), steps=steps)
        new_cache = type(generator).new_cache

        def kept(batch, rows, new_cache=new_cache):
            caches.append(new_cache(generator, batch, rows))
            return caches[-1]

        generator.new_cache = kept
        known = torch.ones_like(ids, dtype=torch.bool)
        traced_decode(generator, plan, labels, known_ids=ids, known=known, order=order)
    # Rows of the last pass differ: open queries stand there. Everything settled before is the same.
    settled = randar(grid=(3, 4), steps=5).forwards[-1].row_start
    torch.testing.assert_close(
        caches[0].buffer[0, :, :, :, :settled], caches[1].buffer[0, :, :, :, :settled], atol=1e-5, rtol=1e-5
    )


def test_samples_get_orders_of_their_own_that_do_not_depend_on_the_batch():
    plan = randar(grid=(4, 4))
    index = torch.tensor([5, 6, 7])
    orders = decoding_order(plan, 3, index)
    assert orders.shape == (3, 16)
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(decoding_order(plan, 3, index[1:2])[0], orders[1])
    assert not torch.equal(decoding_order(plan, 4, index)[0], orders[0])


@pytest.mark.parametrize("steps", [None, 6])
def test_a_sample_is_the_same_in_any_batch(steps):
    plan = randar(grid=(4, 4), steps=steps)
    generator = tiny_generator(plan, vocab_size=VOCAB)
    index, labels = torch.arange(4), torch.tensor([0, 1, 2, 3])
    together = decode(generator, plan, labels, sampling=Sampling(), sample_index=index)
    alone = decode(generator, plan, labels[2:3], sampling=Sampling(), sample_index=index[2:3])
    assert torch.equal(together[2:3], alone)


def test_given_tokens_are_fed_first_and_kept():
    free = randar(grid=(4, 4))
    generator = tiny_generator(free, vocab_size=VOCAB)
    labels, index = torch.tensor([0, 1]), torch.arange(2)
    given = torch.zeros(2, 16, dtype=torch.bool)
    given[:, 4:8] = True
    ids = torch.randint(VOCAB, (2, 16))
    plan = randar(grid=(4, 4), num_known=4)
    check_plan(plan)
    assert len(plan.forwards) == 12
    one = decode(
        generator, plan, labels, sampling=Sampling(greedy=True), sample_index=index, known_ids=ids, known=given
    )
    assert torch.equal(one[given], ids[given])
    # The plan that decides given tokens pass by pass ends with the same picture.
    two = decode(
        generator, free, labels, sampling=Sampling(greedy=True), sample_index=index, known_ids=ids, known=given
    )
    assert torch.equal(one, two)


def test_a_wrong_number_of_given_tokens_is_refused():
    plan = randar(grid=(4, 4), num_known=4)
    generator = tiny_generator(plan, vocab_size=VOCAB)
    with pytest.raises(UserError, match="expects 4 given tokens in every sample, there are none"):
        decode(generator, plan, torch.tensor([0]), sampling=Sampling(), sample_index=torch.arange(1))


def test_one_network_decodes_along_every_scan():
    trained = rar(grid=(4, 6))
    for name in SCANS:
        plan = rar(grid=(4, 6), scan=name)
        assert plan.same_training(trained)
        check_plan(plan)
    assert not raster(grid=(4, 6)).same_training(trained)


def test_orders_given_per_sample_equal_the_scan_they_spell_out():
    plan, scan = rar(grid=(3, 4)), rar(grid=(3, 4), scan="zigzag")
    generator = tiny_generator(plan, vocab_size=VOCAB)
    ids, labels = torch.randint(VOCAB, (2, 12)), torch.tensor([1, 2])
    spelled = generator.logits(ids, labels, plan, order=scan.order.expand(2, -1))
    torch.testing.assert_close(spelled, generator.logits(ids, labels, scan), atol=1e-5, rtol=1e-5)


def test_a_network_that_is_not_told_its_targets_is_refused():
    plan = rar(grid=(4, 4))
    generator = tiny_generator(plan, positions="none")
    with pytest.raises(UserError, match="positions=own_target"):
        generator.check_plan(plan)


def test_randomness_is_annealed():
    plan = rar(grid=(4, 4), anneal_start=100, anneal_end=200)
    shares = [plan.random_order.share(step) for step in (0, 99, 100, 150, 199, 200, 10**9)]
    assert shares == pytest.approx([1, 1, 1, 0.5, 0.01, 0, 0])
    assert rar(grid=(4, 4)).random_order.share(10**9) == 1.0
    assert rar(grid=(4, 4), anneal_start=5, anneal_end=5).random_order.share(5) == 0.0


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (rar, {"anneal_start": 5, "anneal_end": 4}, "0 <= start <= end"),
        (rar, {"anneal_start": 5}, "both null"),
        (rar, {"scan": "random"}, "schedule.scan=random"),
        (randar, {"steps": 0}, "1..16"),
        (randar, {"steps": 17}, "1..16"),
        (randar, {"order": "spiral"}, "choose random or"),
        (randar, {"num_known": 16}, "something must be left"),
    ],
)
def test_bad_options_are_refused(make, options, message):
    with pytest.raises(UserError, match=message):
        make(grid=(4, 4), **options)
