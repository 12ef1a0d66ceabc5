import pytest
import torch

from vgen.losses.tokens import masked_cross_entropy, token_accuracy, token_cross_entropy


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
