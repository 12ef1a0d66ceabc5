import pytest
import torch
import torch.nn.functional as F

from vgen.errors import UserError
from vgen.tokenizers import quantize
from vgen.tokenizers.base import perplexity
from vgen.tokenizers.quantize import VectorQuantizer


def quantizer(**options):
    torch.manual_seed(0)
    return VectorQuantizer(**({"codebook_size": 32, "codebook_dim": 4} | options))


def test_straight_through_gradient_and_separate_loss_gradients():
    module = quantizer(l2_normalize=False)
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    out = module(z)
    assert torch.allclose(out.latent, module.lookup(out.ids).transpose(1, 2).unflatten(2, (3, 5)), atol=1e-6)
    probe = torch.randn_like(z)
    (grad,) = torch.autograd.grad((out.latent * probe).sum(), z, retain_graph=True)
    assert torch.equal(grad, probe)
    assert torch.autograd.grad(out.losses["vq"], z, retain_graph=True, allow_unused=True) == (None,)
    weight = module.embedding.weight
    assert torch.autograd.grad(out.losses["commit"], weight, retain_graph=True, allow_unused=True) == (None,)
    (pull,) = torch.autograd.grad(out.losses["vq"], weight)
    assert set(pull.abs().sum(1).nonzero().flatten().tolist()) == set(out.ids.unique().tolist())


def test_commitment_gradient_passes_the_normalisation():
    z = torch.randn(2, 4, 2, 2, requires_grad=True)
    out = quantizer()(z)
    assert torch.allclose(out.latent.norm(dim=1), torch.ones(2, 2, 2))
    (grad,) = torch.autograd.grad(out.losses["commit"], z)
    assert grad.abs().sum() > 0
    assert (grad * z).sum(1).abs().max() < 1e-6  # scaling a latent changes nothing


def test_first_code_wins_a_tie():
    module = quantizer(codebook_size=6, codebook_dim=2)
    module.embedding.weight.data = torch.tensor([[-1.0, 0], [1, 1], [3, 0], [1, 0], [2, 0], [1, 1]])
    z = torch.tensor([[5.0, 0.0], [2.0, 2.0], [-3.0, 0.0]]).T.view(1, 2, 1, 3)
    assert module(z).ids.tolist() == [[2, 1, 0]]


def test_search_in_chunks_finds_the_same_codes(monkeypatch):
    module = quantizer(codebook_size=50)
    rows = F.normalize(torch.randn(301, 4), dim=1)
    whole = module.nearest(rows, module.codebook)
    assert torch.equal(whole, (rows @ module.codebook.T).argmax(1))
    monkeypatch.setattr(quantize, "SEARCH_BUDGET", 50 * 7)
    assert torch.equal(module.nearest(rows, module.codebook), whole)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.1])
def test_bfloat16_autocast_and_inputs_are_computed_in_float32(entropy_weight):
    module = quantizer(codebook_size=4096, codebook_dim=8, entropy_weight=entropy_weight)
    z = torch.randn(2, 8, 8, 8).bfloat16()
    exact = module(z.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = module(z)
    assert torch.equal(out.ids, exact.ids)
    assert out.latent.dtype == torch.bfloat16
    for name, value in out.losses.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, exact.losses[name])


def test_usage_window_counts_recent_training_tokens_only():
    module = quantizer(codebook_size=8, codebook_dim=2, l2_normalize=False, usage_window=6)
    module.embedding.weight.data = torch.arange(16.0).view(8, 2)

    def see(*ids):
        module(module.embedding.weight[list(ids)].T.view(1, 2, 1, len(ids)).detach())

    assert module.usage() == 1 / 8  # the empty window counts as code 0
    see(3, 4, 3)
    assert module.codebook_used.tolist() == [0, 0, 0, 3, 4, 3]
    assert module.usage() == 3 / 8
    see(5, 6, 7, 5)
    assert module.codebook_used.tolist() == [4, 3, 5, 6, 7, 5]
    module.eval()
    see(1, 1, 1)
    assert module.codebook_used.tolist() == [4, 3, 5, 6, 7, 5]
    module.train()
    see(*range(8))
    assert module.codebook_used.tolist() == [2, 3, 4, 5, 6, 7]
    assert not module.codebook_used.requires_grad
    assert module.codebook_used.grad_fn is None


def test_dead_codes_show_in_usage_and_perplexity():
    module = quantizer(codebook_size=16, usage_window=64)
    module.embedding.weight.data[3:] = -module.embedding.weight.data[
        :1
    ]  # 13 codes in one place, the first of them wins
    out = module(torch.randn(4, 4, 4, 4))
    assert module.usage() <= 4 / 16
    assert perplexity(out.ids, 16) <= 4
    assert perplexity(torch.arange(16), 16) == pytest.approx(16)
    assert perplexity(torch.zeros(9, dtype=torch.int64), 16) == 1


def test_a_training_step_does_not_grow_state():
    module = quantizer(entropy_weight=0.1)
    for _ in range(3):
        out = module(torch.randn(1, 4, 2, 2, requires_grad=True))
        sum(out.losses.values()).backward()
    assert module.state_dict()["codebook_used"].shape == (65536,)
    assert all(not value.requires_grad for value in module.buffers())


def test_codebook_starts_normalised_or_small():
    assert torch.allclose(quantizer().embedding.weight.norm(dim=1), torch.ones(32))
    assert quantizer(l2_normalize=False).embedding.weight.abs().max() <= 1 / 32


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("codebook_size", 0),
        ("codebook_dim", 0),
        ("usage_window", 0),
        ("commitment_weight", -0.1),
        ("entropy_weight", -1),
        ("entropy_temperature", 0.0),
    ],
)
def test_bad_options(option, value):
    with pytest.raises(UserError, match=option):
        quantizer(**{option: value})
