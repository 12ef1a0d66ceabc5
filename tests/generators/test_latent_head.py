"""Continuous tokens: embedding, diffusion loss and sampler, and the decoding loop that carries vectors."""

import pytest
import torch

from tests.generators.helpers import tiny_generator, tiny_joint
from vgen.errors import UserError
from vgen.generators.diffusion import Diffusion
from vgen.generators.latent_head import LatentEmbedding, LatentHead
from vgen.sampling.decode import decode
from vgen.sampling.engine import Decoder
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.masked import masked
from vgen.schedules.masked_random import masked_random

PLAN = masked_random(grid=(2, 3), num_condition=3, steps=4)
LABELS, INDEX = torch.tensor([0, 3, 4]), torch.arange(3)
QUICK = Sampling(seed=2, diffusion_steps=4, guidance=Guidance(scale=2.0))


def network(**options):
    return tiny_joint(PLAN, latent_channels=4, **options)


def test_a_latent_that_is_not_known_is_the_mask_token():
    embedding = LatentEmbedding(channels=4, dim=8)
    latents = torch.randn(2, 3, 4)
    known = embedding(latents)
    hidden = torch.tensor([[True, False, False], [False, False, True]])
    out = embedding(latents.masked_fill(hidden[..., None], torch.nan))
    assert torch.equal(out[~hidden], known[~hidden])
    assert torch.equal(out[hidden], embedding.mask_token.expand(2, -1))
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in embedding.parameters())


@torch.inference_mode()
def test_hidden_latents_do_not_leak_and_the_loss_is_theirs():
    generator, latents = network(), torch.randn(1, 6, 4)
    hidden = torch.tensor([[True, False, True, False, True, True]])
    base = generator.logits(latents, LABELS[:1], PLAN, hidden=hidden)
    assert base.shape == (1, 6, 32)
    for place in range(6):
        other = latents.clone()
        other[0, place] += 1
        moved = (generator.logits(other, LABELS[:1], PLAN, hidden=hidden) - base).abs().amax(-1)[0]
        assert bool((moved == 0).all() if hidden[0, place] else (moved > 1e-4).all())
    index, noise = torch.randint(1000, (1, 6, 4)), torch.randn(1, 6, 4, 4)
    head = generator.latent_head
    loss = head.loss(base, latents, hidden, index, noise)
    assert loss.isfinite()
    assert torch.equal(head.loss(base, latents + 9 * ~hidden[..., None], hidden, index, noise), loss)
    assert not torch.equal(head.loss(base, latents + 9 * hidden[..., None], hidden, index, noise), loss)


def test_the_bound_trains_the_spread_and_not_the_noise():
    chain = Diffusion.over(100)
    output = torch.randn(5, 6, requires_grad=True)
    start, index, noise = torch.randn(5, 3), torch.tensor([0, 1, 40, 70, 99]), torch.randn(5, 3)
    chain.loss(lambda *_: output, start, index, noise).sum().backward()
    squared = 2 * (output[:, :3] - noise).detach() / 3
    torch.testing.assert_close(output.grad[:, :3], squared)
    assert (output.grad[:, 3:] != 0).any(1).all()


def test_a_chain_given_the_true_noise_ends_at_the_start():
    """With a network that knows the answer, every respaced chain returns it."""
    answer = torch.tensor([[0.7, -1.2]])
    for steps in (1, 2, 7, 50):
        chain = Diffusion.over(200, steps)
        by_time = dict(zip(chain.times.tolist(), chain.alphas.tolist(), strict=True))

        def predict(state, time, by_time=by_time):
            share = by_time[int(time)]
            return torch.cat([(state - share**0.5 * answer) / (1 - share) ** 0.5, torch.zeros(1, 2)], dim=1)

        out = chain.sample(predict, lambda step: torch.randn(1, 2), temperature=1.0)
        torch.testing.assert_close(out, answer, atol=2e-3, rtol=1e-3)


def test_samples_do_not_depend_on_the_batch_and_known_latents_stay():
    generator, states = network(), []

    def watch(_, latents):
        states.append(latents.clone())

    together = decode(generator, PLAN, LABELS, sampling=QUICK, sample_index=INDEX, watch=watch)
    assert together.shape == (3, 6, 4)
    alone = [
        decode(generator, PLAN, LABELS[i : i + 1], sampling=QUICK, sample_index=INDEX[i : i + 1]) for i in range(3)
    ]
    scale = together.abs().max().item()
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4 * scale, rtol=1e-4)
    known = [(~state.isnan()).all(-1) for state in states]
    assert [int(one[0].sum()) for one in known] == [*PLAN.decided_before()[1:], 6]
    assert not torch.equal(known[0][0], known[0][1]) or not torch.equal(known[1][0], known[1][1]), "one order for all"
    for before, state, was in zip(states, states[1:], known, strict=False):
        assert torch.equal(before[was], state[was])
    assert torch.equal(states[-1], together)
    engine = Decoder(generator, PLAN)(LABELS, sampling=QUICK, sample_index=INDEX)
    assert torch.equal(engine, together)


def test_guidance_reaches_the_draws_and_the_null_branch_runs_only_where_it_counts():
    generator, batches = network(), []
    step = type(generator).step
    generator.step = lambda ids, *args, **more: batches.append(len(ids)) or step(generator, ids, *args, **more)

    def draw(**guidance):
        batches.clear()
        sampling = Sampling(seed=2, diffusion_steps=4, guidance=Guidance(**guidance))
        return decode(generator, PLAN, LABELS, sampling=sampling, sample_index=INDEX), list(batches)

    plain, passes = draw(scale=1.0)
    assert passes == [3, 3, 3, 3]
    linear = {"schedule": "linear", "initial": 1.0}
    before, passes = draw(scale=3.0, **linear)
    assert passes == [3, 6, 6, 6], "the first pass knows nothing, so its weight is 1"
    after, passes = draw(scale=3.0, counted="after", **linear)
    assert passes == [6, 6, 6, 6]
    assert not torch.allclose(plain, before)
    assert not torch.allclose(before, after)


def test_the_guidance_of_maskgen_follows_the_tokens_known_after_each_pass():
    """1 + (cfg - 1) (K - remaining) / K, where MAR counts one token as remaining in the last pass."""
    generator, weights = network(), []
    draw = generator.latent_head.draw

    def recorded(states, places, weight, *arguments, **options):
        weights.append(weight)
        return draw(states, places, weight, *arguments, **options)

    generator.latent_head.draw = recorded
    guidance = Guidance(scale=3.0, schedule="linear", initial=1.0, counted="after")
    decode(
        generator, PLAN, LABELS, sampling=Sampling(diffusion_steps=2, guidance=guidance), sample_index=torch.arange(3)
    )
    known = [*PLAN.decided_before()[1:], 5]
    assert weights == pytest.approx([1 + 2 * count / 6 for count in known])
    plan = masked(grid=(2, 3), num_condition=3, steps=2)
    tokens = tiny_joint(plan)
    with pytest.raises(UserError, match="set along=passes"):
        decode(tokens, plan, LABELS, sampling=Sampling(guidance=guidance), sample_index=INDEX)


def test_a_small_network_learns_latents_and_draws_them():
    """Four captions, six latents each: the loss of MaskGen-KL, then its sampler."""
    torch.manual_seed(0)
    generator = tiny_joint(PLAN, latent_channels=2, count=4).train()
    for module in generator.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    generator.latent_head.initialise()
    generator.latent_head.largest = 3.0
    patterns = torch.randn(4, 6, 2)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        labels = torch.randint(4, (32,))
        hidden = PLAN.masking.hidden(torch.rand(32), torch.rand(32, 6))
        states = generator.logits(patterns[labels], labels, PLAN, hidden=hidden)
        index, noise = torch.randint(1000, (32, 6, 4)), torch.randn(32, 6, 4, 2)
        loss = generator.latent_head.loss(states, patterns[labels], hidden, index, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    labels = torch.arange(8) % 4
    sampling = Sampling(diffusion_steps=25)
    drawn = decode(generator.eval(), PLAN, labels, sampling=sampling, sample_index=torch.arange(8))
    assert (drawn - patterns[labels]).square().mean() < 0.3, "patterns of variance 1"


def test_what_does_not_go_with_latents_is_named():
    generator = network()
    request = {"sampling": Sampling(greedy=True), "sample_index": INDEX}
    with pytest.raises(UserError, match="greedy=false"):
        decode(generator, PLAN, LABELS, **request)
    known = torch.zeros(3, 6, dtype=torch.bool)
    with pytest.raises(UserError, match="cannot be given"):
        decode(generator, PLAN, LABELS, known=known, known_ids=known.long(), sampling=QUICK, sample_index=INDEX)
    with pytest.raises(UserError, match="choose schedule=masked_random"):
        generator.check_plan(masked(grid=(2, 3), num_condition=3, steps=2))
    with pytest.raises(UserError, match="vocabulary of 0"):
        tiny_generator(PLAN, latent_head=LatentHead(channels=2, num_tokens=6, dim=32, width=8))
    with pytest.raises(UserError, match="train_steps"):
        LatentHead(channels=2, num_tokens=6, dim=32, width=8, train_steps=1)
    with pytest.raises(UserError, match="diffusion_steps=0"):
        Sampling(diffusion_steps=0)
