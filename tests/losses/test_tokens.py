import pytest
import torch

from vgen.losses import tokens
from vgen.losses.tokens import linear_cross_entropy, masked_cross_entropy, token_accuracy, token_cross_entropy


@pytest.fixture
def case():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=draw)
    return logits, torch.randint(7, (3, 5), generator=draw), torch.rand(3, 5, generator=draw) < 0.5


def test_visible_tokens_count_less_in_one_mean_over_the_batch(case):
    logits, ids, hidden = case
    smooth = 0.9 * torch.nn.functional.one_hot(ids, 7) + 0.1 / 7
    each = -(smooth * logits.log_softmax(-1)).sum(-1)
    want = (each[hidden].sum() + 0.25 * each[~hidden].sum()) / (hidden.sum() + 0.25 * (~hidden).sum())
    got = masked_cross_entropy(logits, ids, hidden, visible_weight=0.25, label_smoothing=0.1)
    torch.testing.assert_close(got, want)


def test_equal_weights_give_the_plain_mean(case):
    logits, ids, hidden = case
    got = masked_cross_entropy(logits, ids, hidden, visible_weight=1.0, label_smoothing=0.1)
    torch.testing.assert_close(got, token_cross_entropy(logits, ids, label_smoothing=0.1))
    plain = token_cross_entropy(logits, ids)
    assert not torch.isclose(got, plain)
    every = torch.ones(3)
    torch.testing.assert_close(token_cross_entropy(logits, ids, every, label_smoothing=0.1), got)


def test_accuracy_of_hidden_tokens_is_a_mean_of_means():
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 2], [1, 1, 0, 0]]), 3).float()
    ids = torch.tensor([[0, 1, 2, 0], [1, 0, 1, 1]])
    hidden = torch.tensor([[True, True, True, True], [True, True, False, False]])
    assert token_accuracy(logits, ids, hidden).item() == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert token_accuracy(logits, ids).item() == pytest.approx(4 / 8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("hides", [False, True])
def test_the_loss_of_a_product_in_chunks_has_the_gradients_of_the_plain_one(hides, smoothing, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK_LOGITS", 30)  # 4 rows of 7 logits at a time: chunks of 4, 4, 4 and 3
    torch.manual_seed(0)
    features, weight, bias = torch.randn(3, 5, 4), torch.randn(7, 4), torch.randn(7)
    ids, hidden = torch.randint(7, (3, 5)), torch.rand(3, 5) < 0.5
    inputs = [tensor.double().requires_grad_() for tensor in (features, weight, bias)]
    logits = torch.nn.functional.linear(*inputs)
    if hides:
        plain = masked_cross_entropy(logits, ids, hidden, visible_weight=0.25, label_smoothing=smoothing)
    else:
        plain = token_cross_entropy(logits, ids, label_smoothing=smoothing)
    weights = torch.where(hidden, 1.0, 0.25) if hides else None
    floor = tokens.MASKED_FLOOR if hides else 0.0
    loss, right = linear_cross_entropy(*inputs, ids, weights=weights, floor=floor, label_smoothing=smoothing)
    torch.testing.assert_close(loss, plain)
    assert torch.equal(right, logits.argmax(-1) == ids)
    wanted = torch.autograd.grad(3.0 * plain, inputs)
    torch.testing.assert_close(torch.autograd.grad(3.0 * loss, inputs), wanted)


def test_the_loss_of_a_product_takes_the_dtype_of_autocast_and_gives_gradients_in_their_own():
    torch.manual_seed(0)
    features, weight = torch.randn(2, 6, 16, requires_grad=True), torch.randn(9, 16, requires_grad=True)
    ids = torch.randint(9, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(features, weight, None, ids)
        plain = token_cross_entropy(torch.nn.functional.linear(features, weight).float(), ids)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain)
    got = torch.autograd.grad(loss, (features, weight))
    assert {gradient.dtype for gradient in got} == {torch.float32}
    torch.testing.assert_close(got, torch.autograd.grad(plain, (features, weight)), atol=2e-3, rtol=2e-2)
