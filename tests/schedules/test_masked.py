"""Masked generation: counts, temperatures, what a pass sees, given tokens, independence of the batch."""

import json

import pytest
import torch

from tests.generators.helpers import tiny_generator
from tests.paths import GOLDEN
from vgen.errors import UserError
from vgen.generators.transformer import Transformer
from vgen.sampling.decode import decode
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.__main__ import contexts, main
from vgen.schedules.masked import masked
from vgen.schedules.masking import Masking, hidden_share
from vgen.schedules.raster import raster
from vgen.schedules.unmasking import gumbel

VOCAB = 23


def network(plan, **options):
    switches = {"norm": "layer", "rope": "none", "positions": "own", "bias": True} | options
    return tiny_generator(plan, vocab_size=VOCAB, **switches)


def traced(generator, plan, labels, *, sampling=None, **options):
    """Decoded ids, and per pass the ids that were fed (conditional branch) and the number of branches."""
    fed, branches = [], []

    def step(ids, *arguments, **more):
        fed.append(ids[: len(labels), : plan.num_tokens])
        branches.append(len(ids) // len(labels))
        return Transformer.step(generator, ids, *arguments, **more)

    generator.step = step
    try:
        sampling = sampling or Sampling(seed=1)
        ids = decode(generator, plan, labels, sampling=sampling, sample_index=torch.arange(len(labels)), **options)
    finally:
        del generator.step
    return ids, torch.stack(fed), branches


def test_published_counts_and_temperatures():
    stated = json.loads((GOLDEN / "maskgit" / "schedules.json").read_text())["published"]
    assert set(stated) == {"l32", "b64", "s128"}
    for entry in stated.values():
        plan = masked(grid=(entry["seq_len"],), steps=entry["steps"])
        want = [row["masked_before"] for row in entry["per_step"]]
        assert [entry["seq_len"] - count for count in plan.decided_before()] == want


def test_every_pass_feeds_the_known_tokens_and_the_mask_and_keeps_what_it_knows():
    plan = masked(grid=(3, 4), steps=5)
    ids, fed, _ = traced(network(plan), plan, torch.tensor([0, 3, 1]))
    known = fed != VOCAB
    assert known.sum(2).T.tolist() == [plan.decided_before()] * 3
    assert (known[1:] >= known[:-1]).all(), "a known token was opened again"
    assert torch.equal(torch.where(known, fed, 0), torch.where(known, ids, 0)), "a known token changed"
    assert (ids < VOCAB).all()


def test_cached_keys_are_not_kept():
    plan, other = masked(grid=(4, 4)), raster(grid=(4, 4))
    assert not plan.needs_cache
    assert other.needs_cache
    generator = network(plan)
    generator.new_cache = None
    decode(generator, plan, torch.tensor([1]), sampling=Sampling(), sample_index=torch.tensor([0]))


def test_decoding_sees_what_training_sees():
    """The logits of every pass are those of teacher forcing with the same tokens hidden."""
    plan = masked(grid=(3, 4), steps=4)
    generator, labels, logits = network(plan), torch.tensor([0, 3]), []
    ids, fed, _ = traced(generator, plan, labels, trace=lambda _, guided: logits.append(guided))
    with torch.inference_mode():
        for seen, guided in zip(fed, logits, strict=True):
            forced = generator.logits(ids, labels, plan, hidden=seen == VOCAB)
            torch.testing.assert_close(guided, forced, atol=1e-5, rtol=1e-5)


def test_hidden_tokens_do_not_leak_and_visible_ones_reach_every_place():
    plan = masked(grid=(2, 3), steps=2)
    generator, labels = network(plan), torch.tensor([0])
    ids = torch.randint(VOCAB, (1, 6), generator=torch.Generator().manual_seed(1))
    hidden = torch.tensor([[True, False, True, False, True, True]])
    with torch.inference_mode():
        base = generator.logits(ids, labels, plan, hidden=hidden)
        for place in range(6):
            other = ids.clone()
            other[0, place] = (other[0, place] + 1) % VOCAB
            moved = (generator.logits(other, labels, plan, hidden=hidden) - base).abs().amax(-1)[0]
            assert bool((moved == 0).all() if hidden[0, place] else (moved > 1e-4).all())


@pytest.mark.parametrize("confidence", ["logit", "log-probability"])
def test_samples_do_not_depend_on_the_batch(confidence):
    plan = masked(grid=(4, 4), steps=6, confidence=confidence, draw_temperature=1.0)
    generator, labels, index = network(plan), torch.arange(5), torch.arange(5)
    guidance = Guidance(scale=2.0, schedule="linear", convention="one-plus", along="passes", initial=0.0)
    sampling = Sampling(seed=3, temperature=0.8, top_k=12, guidance=guidance)
    together = decode(generator, plan, labels, sampling=sampling, sample_index=index)
    alone = [
        decode(generator, plan, labels[i : i + 1], sampling=sampling, sample_index=index[i : i + 1]) for i in range(5)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, decode(generator, plan, labels, sampling=Sampling(seed=4), sample_index=index))


def test_given_tokens_are_seen_from_the_first_pass_and_kept():
    plan = masked(grid=(4, 4), steps=4)
    generator, labels = network(plan), torch.tensor([0, 1, 2])
    ids = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    known = torch.zeros_like(ids, dtype=torch.bool)
    known[0, :3], known[1, 2:14], known[2] = True, True, True
    out, fed, _ = traced(generator, plan, labels, known_ids=ids, known=known)
    assert torch.equal(out[known], ids[known])
    assert torch.equal(fed[0] != VOCAB, known)
    assert torch.equal(fed[0][known], ids[known])
    opened = (fed == VOCAB).sum(2)
    # 13, 4 and 0 open tokens follow the same shares; the last pass leaves none.
    shares = [hidden_share("arccos", (k + 1) / 4) for k in range(3)]
    assert opened[:, 0].tolist() == [13, *(int(13 * share) for share in shares)]
    assert opened[0, 1] == 4
    assert (opened[1:, 1] < opened[:-1, 1]).all()
    assert (opened[:, 2] == 0).all()


def test_the_null_branch_runs_only_in_guided_passes():
    plan = masked(grid=(4, 4), steps=4)
    generator, labels = network(plan), torch.tensor([0, 1])

    def branches(**options):
        return traced(generator, plan, labels, sampling=Sampling(guidance=Guidance(along="passes", **options)))[2]

    linear = {"schedule": "linear", "convention": "one-plus", "initial": 0.0}
    assert branches(scale=3.0, **linear) == [1, 2, 2, 2]
    assert branches(scale=3.0, end=2) == [2, 2, 1, 1]
    assert branches(scale=3.0, start=1, end=3) == [1, 2, 2, 1]
    assert branches(scale=1.0) == [1, 1, 1, 1]


def test_guidance_along_passes_needs_their_number():
    from vgen.schedules.zipar import zipar

    plan = zipar(grid=(4, 5), window=2, adaptive=True)
    generator, options = tiny_generator(plan), {"sample_index": torch.tensor([0])}
    with pytest.raises(UserError, match="along=tokens"):
        decode(generator, plan, torch.tensor([0]), sampling=Sampling(guidance=Guidance(along="passes")), **options)


def test_without_noise_the_most_likely_tokens_are_taken():
    plan = masked(grid=(4, 4), steps=4, noise_temperature=0.0)
    generator, labels = network(plan), torch.tensor([0, 1])
    plain = traced(generator, plan, labels, sampling=Sampling(seed=1))[0]
    assert torch.equal(plain, traced(generator, plan, labels, sampling=Sampling(seed=2))[0])
    one = masked(grid=(4, 4), steps=1, noise_temperature=9.0)
    with torch.inference_mode():
        hidden = torch.ones(2, 16, dtype=torch.bool)
        likely = generator.logits(torch.zeros(2, 16, dtype=torch.int64), labels, one, hidden=hidden).argmax(-1)
    assert torch.equal(traced(generator, one, labels)[0], likely), "the last pass has no noise"


def test_training_hides_as_many_tokens_as_the_draw_says():
    progress = torch.tensor([0.0, 0.5, 0.999999])
    hidden = Masking("arccos").hidden(progress, torch.rand(3, 30))
    assert hidden.sum(1).tolist() == [30, 20, 1]
    draws = torch.rand(20_000, 8)
    often = Masking("cosine").hidden(torch.rand(20_000), draws).float()
    assert often.mean().item() == pytest.approx(2 / torch.pi, abs=0.02)
    torch.testing.assert_close(often.mean(0), often.mean().expand(8), atol=0.02, rtol=0.0)


def test_ratios_fall_from_all_to_none():
    for ratio in ("arccos", "cosine", "linear", "square", "root"):
        values = hidden_share(ratio, torch.linspace(0, 1, 50, dtype=torch.float64))
        assert values[0].item() == pytest.approx(1.0)
        assert values[-1].item() == pytest.approx(0.0, abs=1e-9)
        assert (values[1:] < values[:-1]).all()
        assert hidden_share(ratio, 0.3) == pytest.approx(float(hidden_share(ratio, torch.tensor(0.3))), abs=1e-6)


def test_gumbel_noise_has_its_mean_and_is_finite():
    uniform = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert gumbel(uniform).mean().item() == pytest.approx(0.5772, abs=0.01)
    assert gumbel(torch.tensor([0.0, 1 - 2**-48], dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 17}, r"1\.\.16"),
        ({"ratio": "cubic"}, "choose one of arccos"),
        ({"noise_temperature": -1.0}, "noise_temperature"),
        ({"draw_temperature": float("nan")}, "draw_temperature"),
        ({"confidence": "entropy"}, "logit or log-probability"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        masked(grid=(4, 4), **options)


def test_networks_and_schedules_that_do_not_fit_are_refused():
    plan = masked(grid=(4, 4))
    with pytest.raises(UserError, match="mask token"):
        tiny_generator(raster(grid=(4, 4))).check_plan(plan)
    with pytest.raises(UserError, match="mask token"):
        network(plan).check_plan(raster(grid=(4, 4)))
    assert plan.same_training(masked(grid=(4, 4), steps=3, confidence="log-probability"))
    assert not plan.same_training(raster(grid=(4, 4)))


def test_the_command_shows_counts_and_says_that_the_places_are_an_example(capsys):
    assert main(["masked", "--grid", "32"]) == 0
    out = capsys.readouterr().out
    assert "8 for 32 tokens" in out
    assert "the positions are one example" in out
    assert "a mask token" in out
    assert main(["masked", "--grid", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [len(step) for step in found["steps"]] == [3, 3, 2, 3, 3, 4, 4, 10]
    assert found["context_share"] == 1.0
    assert [int(seen.max()) for seen in contexts(masked(grid=(32,)))] == [0, 3, 6, 8, 11, 14, 18, 22]
