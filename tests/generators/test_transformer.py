import pytest
import torch
from torch import nn

from tests.generators.helpers import tiny_generator
from vgen.errors import UserError
from vgen.generators.conditioning import ClassCondition, TextCondition
from vgen.generators.transformer import Transformer
from vgen.losses.tokens import token_cross_entropy
from vgen.schedules.neighboring import neighboring
from vgen.schedules.raster import raster

PLAN = raster(grid=(3, 4))


def test_a_future_token_never_changes_a_past_logit_and_every_past_token_does():
    generator = tiny_generator(PLAN)
    ids, labels = torch.randint(23, (1, 12)), torch.tensor([2])
    base = generator.logits(ids, labels, PLAN)
    for changed in range(12):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % 23
        moved = (generator.logits(other, labels, PLAN) - base).abs().amax(-1)[0] > 0
        assert not moved[: changed + 1].any()
        assert moved[changed + 1 :].all()


def test_dropped_samples_get_the_null_condition_and_no_other():
    generator = tiny_generator(PLAN)
    ids = torch.randint(23, (2, 12))
    mixed = generator.logits(ids, torch.tensor([1, 3]), PLAN, drop=torch.tensor([False, True]))
    plain = generator.logits(ids, torch.tensor([1, 5]), PLAN)
    torch.testing.assert_close(mixed, plain)
    assert (generator.logits(ids, torch.tensor([1, 3]), PLAN)[1] - plain[1]).abs().max() > 1e-3


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        generator = tiny_generator(
            PLAN, gradient_checkpointing=checkpointing, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0
        ).train()
        torch.manual_seed(1)
        ids = torch.randint(23, (2, 12))
        token_cross_entropy(generator.logits(ids, torch.tensor([0, 1]), PLAN), ids).backward()
        gradients.append([p.grad.clone() for p in generator.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_dropout_acts_only_in_training():
    generator = tiny_generator(PLAN)
    ids, labels = torch.randint(23, (1, 12)), torch.tensor([0])
    assert torch.equal(generator.logits(ids, labels, PLAN), generator.logits(ids, labels, PLAN))
    generator.train()
    assert not torch.equal(generator.logits(ids, labels, PLAN), generator.logits(ids, labels, PLAN))


def test_initialisation_follows_the_reference():
    generator = Transformer(
        vocab_size=512, grid=(2, 2), condition=ClassCondition(num_classes=9, dim=128), dim=128, depth=2, heads=4
    )
    assert (generator.outputs[0].weight == 0).all()
    assert all((norm.weight == 1).all() for norm in generator.norms)
    assert abs(generator.layers[0].attention.wqkv.weight.std().item() - 0.02) < 1e-3
    assert abs(generator.tok_embeddings.weight.std().item() - 0.02) < 1e-3


def test_half_precision_weights_keep_float32_logits():
    generator = tiny_generator(PLAN)
    ids = torch.randint(23, (1, 12))
    exact = generator.logits(ids, torch.tensor([0]), PLAN)
    generator = generator.to(torch.bfloat16)
    rough = generator.logits(ids, torch.tensor([0]), PLAN)
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(
    "options", [{"dim": 33}, {"dim": 30, "heads": 10}, {"heads": 2, "kv_heads": 3}, {"rope_placeless": "none"}]
)
def test_sizes_that_do_not_fit_are_refused(options):
    with pytest.raises(UserError, match="generator"):
        tiny_generator(PLAN, **options)


def test_a_plan_for_another_grid_or_network_is_refused():
    generator = tiny_generator(PLAN)
    with pytest.raises(UserError, match="grid"):
        generator.check_plan(raster(grid=(4, 3)))
    with pytest.raises(UserError, match="trained for another schedule"):
        generator.check_plan(raster(grid=(3, 4), num_condition=2))


def test_padded_caption_slots_influence_nothing_else():
    torch.manual_seed(0)
    plan = raster(grid=(2, 3), num_condition=4)
    generator = Transformer(
        vocab_size=11,
        grid=(2, 3),
        condition=TextCondition(caption_dim=6, num_slots=4, dim=32),
        dim=32,
        depth=2,
        heads=2,
    ).eval()
    nn.init.normal_(generator.outputs[0].weight)
    ids, text = torch.randint(11, (1, 6)), torch.randn(1, 4, 6)
    padding = torch.tensor([[False, False, True, True]])
    other = text.clone()
    other[:, :2] += 1.0
    base = generator.logits(ids, text, plan, padding=padding)
    torch.testing.assert_close(generator.logits(ids, other, plan, padding=padding), base)
    assert (generator.logits(ids, other, plan) - generator.logits(ids, text, plan)).abs().max() > 1e-3


def test_the_network_memorises_sequences_and_decodes_them_back():
    from vgen.sampling.decode import decode
    from vgen.sampling.settings import Sampling

    plan = raster(grid=(3, 3))
    generator = tiny_generator(
        plan, vocab_size=7, num_classes=4, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0
    )
    generator.train()
    ids, labels = torch.randint(7, (4, 9)), torch.arange(4)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=5e-3)
    for _ in range(150):
        loss = token_cross_entropy(generator.logits(ids, labels, plan), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decoded = decode(generator.eval(), plan, labels, sampling=Sampling(), sample_index=torch.arange(4))
    assert torch.equal(decoded, ids)


def test_a_plan_first_used_for_decoding_still_trains():
    from vgen.sampling.decode import decode
    from vgen.sampling.settings import Sampling

    plan = raster(grid=(2, 2))
    generator = tiny_generator(plan)
    ids = decode(generator, plan, torch.tensor([1]), sampling=Sampling(), sample_index=torch.tensor([0])).clone()
    generator.logits(ids, torch.tensor([1]), plan).sum().backward()
    assert generator.tok_embeddings.weight.grad is not None


@pytest.mark.parametrize("order", ["raster", "neighboring"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_of_a_readout_are_the_logits(order, bias):
    plan = {"raster": raster, "neighboring": neighboring}[order](grid=(3, 4))
    generator = tiny_generator(plan, head_bias=bias)
    for output in generator.outputs:
        if bias:
            torch.nn.init.normal_(output.bias)
    ids, labels = torch.randint(23, (2, 12)), torch.tensor([1, 4])
    logits = generator.logits(ids, labels, plan)
    readout = generator.readout(ids, labels, plan)
    product = torch.nn.functional.linear(readout.features, readout.weight, readout.bias)
    torch.testing.assert_close(product, logits, atol=1e-5, rtol=1e-5)
    if order == "neighboring":
        # The definition: the mean of the heads' logits over the reads.
        states, read, _ = generator._teach(ids, labels, plan)
        want = torch.zeros(2, 12, 23)
        for head, state in enumerate(states):
            each = generator.outputs[head](generator.norms[head](state[:, read.slots[head]]))
            want.index_add_(1, read.targets[head], each * read.weights[head][:, None])
        torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)


def test_a_narrow_residual_stream_is_for_training_only():
    plan = raster(grid=(3, 4))
    generator = tiny_generator(plan)
    ids, labels = torch.randint(23, (2, 12)), torch.tensor([1, 4])
    with torch.autocast("cpu", torch.bfloat16):
        before = generator.logits(ids, labels, plan)
        generator.residual_dtype = torch.bfloat16
        assert torch.equal(generator.logits(ids, labels, plan), before)
        for dropout in (module for module in generator.modules() if isinstance(module, torch.nn.Dropout)):
            dropout.p = 0.0
        narrow = generator.train().logits(ids, labels, plan)
    assert not torch.equal(narrow, before)
    torch.testing.assert_close(narrow, before, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("order", ["raster", "neighboring"])
@pytest.mark.parametrize("group", [2, 3, 5])
def test_groups_of_blocks_run_every_block_once(order, group, monkeypatch):
    """The compiler itself left out; depths that the group divides, that leave a rest, and below the group."""
    plan = {"raster": raster, "neighboring": neighboring}[order](grid=(3, 4))
    ids, labels = torch.randint(23, (2, 12)), torch.tensor([1, 4])
    still = {f"{name}_dropout": 0.0 for name in ("token", "residual", "ffn")}
    generator = tiny_generator(plan, depth=4, **still).train()
    want = generator.logits(ids, labels, plan)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    generator.compile_blocks(group=group)
    assert torch.equal(generator.logits(ids, labels, plan), want)
    with pytest.raises(UserError, match="groups of at least 1"):
        generator.compile_blocks(group=0)


@pytest.mark.slow
def test_compiled_groups_have_the_gradients_of_plain_blocks(traced_only):
    from torch._dynamo.utils import counters

    ids, labels = torch.randint(23, (2, 12)), torch.tensor([1, 4])
    still = {f"{name}_dropout": 0.0 for name in ("token", "residual", "ffn")}
    gradients = []
    for compiled in (False, True):
        generator = tiny_generator(PLAN, depth=4, **still).train()
        if compiled:
            torch._dynamo.reset()
            counters.clear()
            generator.compile_blocks(group=2)
        token_cross_entropy(generator.logits(ids, labels, PLAN), ids).backward()
        gradients.append([parameter.grad for parameter in generator.parameters() if parameter.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
