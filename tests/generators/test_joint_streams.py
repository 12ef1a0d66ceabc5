"""Text and tokens in streams of their own: what sees what, the empty string, decoding as training, bad input."""

import pytest
import torch

from tests.generators.helpers import captions, tiny_generator, tiny_joint
from vgen.errors import UserError
from vgen.generators.joint_text import Captions, JointText
from vgen.losses.tokens import masked_cross_entropy
from vgen.sampling.decode import decode
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.masked import masked
from vgen.schedules.masked_random import masked_random
from vgen.schedules.raster import raster
from vgen.training.sharding import is_unit

VOCAB = 23
PLAN = masked(grid=(3, 4), num_condition=3, steps=4)
LABELS = torch.tensor([0, 3])
INDEX = torch.arange(2)


def ids_of(batch=2):
    return torch.randint(VOCAB, (batch, 12), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_hidden_tokens_do_not_leak_visible_ones_and_text_reach_every_place():
    generator, ids = tiny_joint(PLAN), ids_of(1)
    hidden = torch.rand(1, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    base = generator.logits(ids, LABELS[:1], PLAN, hidden=hidden)
    assert base.shape == (1, 12, VOCAB)
    for place in range(12):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % VOCAB
        moved = (generator.logits(other, LABELS[:1], PLAN, hidden=hidden) - base).abs().amax(-1)[0]
        assert bool((moved == 0).all() if hidden[0, place] else (moved > 1e-4).all())
    text = generator.condition.captions
    for change in ({"features": text.features + 1}, {"pooled": text.pooled + 1}, {"scores": torch.full((6,), 3.0)}):
        generator.condition.attach(Captions(**{"features": text.features, "pooled": text.pooled} | change))
        moved = (generator.logits(ids, LABELS[:1], PLAN, hidden=hidden) - base).abs().amax(-1)
        assert (moved > 1e-4).all(), list(change)


@torch.inference_mode()
def test_a_dropped_caption_is_the_empty_string():
    generator, ids = tiny_joint(PLAN), ids_of()
    dropped = generator.logits(ids, LABELS, PLAN, drop=torch.tensor([True, False]))
    empty = generator.logits(ids, torch.tensor([5, 3]), PLAN)
    assert torch.equal(dropped, empty)
    assert not torch.allclose(dropped, generator.logits(ids, LABELS, PLAN))


@pytest.mark.parametrize("plan", [PLAN, masked_random(grid=(3, 4), num_condition=3, steps=4)], ids=lambda p: p.name)
def test_decoding_sees_what_training_sees(plan):
    generator, traced, states = tiny_joint(plan), [], [torch.full((2, 12), -1)]
    ids = decode(
        generator,
        plan,
        LABELS,
        sampling=Sampling(guidance=Guidance(scale=2.0)),
        sample_index=INDEX,
        trace=lambda _, logits: traced.append(logits),
        watch=lambda _, ids: states.append(ids),
    )
    with torch.inference_mode():
        for before, after, guided in zip(states[:-1], states[1:], traced, strict=True):
            hidden = before < 0
            told, null = (
                generator.logits(ids, LABELS, plan, hidden=hidden, drop=torch.full((2,), drop))
                for drop in (False, True)
            )
            forced = null + 2.0 * (told - null)
            if plan.policy is None:
                # The targets of a pass lie where its order puts them, other places of every sample.
                decided = hidden & (after >= 0)
                assert decided.sum(1).tolist() == [guided.shape[1]] * 2
                forced = torch.stack([rows[places] for rows, places in zip(forced, decided, strict=True)])
                guided, forced = guided.sum(1), forced.sum(1)
            torch.testing.assert_close(guided, forced, atol=2e-5, rtol=1e-4)
    assert (ids >= 0).all()


def test_samples_do_not_depend_on_the_batch():
    generator, labels, index = tiny_joint(PLAN), torch.arange(4), torch.arange(4)
    guidance = Guidance(
        scale=12.0, schedule="power-cosine", convention="one-plus", along="passes", counted="after", power=1.0
    )
    sampling = Sampling(seed=3, guidance=guidance)
    together = decode(generator, PLAN, labels, sampling=sampling, sample_index=index)
    alone = [
        decode(generator, PLAN, labels[i : i + 1], sampling=sampling, sample_index=index[i : i + 1]) for i in range(4)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_gradients_reach_every_parameter():
    generator = tiny_joint(PLAN).train()
    generator.gradient_checkpointing = True
    hidden = torch.arange(12).expand(2, -1) % 2 == 0
    generator.logits(ids_of(), LABELS, PLAN, hidden=hidden).square().mean().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_captions_are_learned_and_sampled_back():
    """Four captions, one pattern of tokens each, by the loss and the loop that MaskGen uses."""
    torch.manual_seed(0)
    plan = masked(grid=(8,), num_condition=3, steps=4, noise_temperature=1.0)
    generator, patterns = tiny_joint(plan, vocab_size=12, count=4).train(), torch.randint(12, (4, 8))
    for block in generator.modules():
        if hasattr(block, "reset_parameters"):
            block.reset_parameters()
    optimizer = torch.optim.AdamW(generator.parameters(), lr=3e-3)
    for _ in range(120):
        labels = torch.randint(4, (32,))
        hidden = plan.masking.hidden(torch.rand(32), torch.rand(32, 8))
        logits = generator.logits(patterns[labels], labels, plan, hidden=hidden, drop=torch.rand(32) < 0.1)
        loss = masked_cross_entropy(logits, patterns[labels], hidden, visible_weight=0.1, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels = torch.arange(16) % 4
    sampling = Sampling(guidance=Guidance(scale=2.0))
    ids = decode(generator.eval(), plan, labels, sampling=sampling, sample_index=torch.arange(16))
    assert (ids == patterns[labels]).float().mean() > 0.9


def test_what_is_missing_or_does_not_fit_is_named():
    condition = JointText(caption_dim=6, num_features=3, pooled_dim=5, dim=8)
    with pytest.raises(UserError, match="text encoders are not part of vgen; give text_features"):
        condition(torch.tensor([0]))
    with pytest.raises(UserError, match=r"\(4, 6, 5\) do not fit this generator, which takes \(3, 6, 5\)"):
        condition.attach(captions(2, features=4))
    with pytest.raises(UserError, match="score_code=sin"):
        JointText(caption_dim=6, num_features=3, pooled_dim=5, dim=8, score_code="sin")
    with pytest.raises(UserError, match=r"pooled of shape \[2, 5\]"):
        Captions(torch.randn(3, 4, 6), torch.randn(2, 5))
    with pytest.raises(UserError, match="last row stands for the empty string"):
        Captions(torch.randn(1, 4, 6), torch.randn(1, 5))
    for switches, message in (
        ({"adaln": []}, r"set generator.adaln=\[condition\]"),
        ({"rope": "own"}, "set generator.rope=none"),
        ({"norm_position": "post"}, "pre-norm"),
        ({"head_bias": True}, "tied_output"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_joint(PLAN, **switches)
    plan = raster(grid=(3, 4), num_condition=3)
    network = tiny_joint(plan)
    network.mask_token = False
    with pytest.raises(UserError, match="choose schedule=masked"):
        network.check_plan(plan)
    generator, sampling = tiny_joint(PLAN), Sampling(diffusion_steps=5)
    with pytest.raises(UserError, match="diffusion_steps has no effect"):
        decode(generator, PLAN, LABELS, sampling=sampling, sample_index=INDEX)


def test_sharding_gathers_joint_blocks_as_a_whole():
    """Their halves are called in parts, which a wrapper around them would not notice."""
    generator, plain = tiny_joint(PLAN), tiny_generator(raster(grid=(2, 2)))
    assert [type(m).__name__ for m in generator.modules() if is_unit(m, False, 0)] == ["JointBlock"] * 2
    assert [type(m).__name__ for m in plain.modules() if is_unit(m, False, 0)] == ["Block"] * 2
    assert is_unit(generator, True, 0)
