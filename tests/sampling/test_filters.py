import pytest
import torch

from vgen.sampling.filters import filter_logits, pick_tokens


def test_top_p_keeps_the_smallest_set_that_exceeds_p_and_always_the_best():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert filter_logits(logits, top_p=0.6).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(logits, top_p=0.01).isfinite().tolist() == [[True, False, False, False]]
    assert torch.equal(filter_logits(logits, top_p=1.0), logits)


def test_ties_at_the_kth_value_survive():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert filter_logits(logits, top_k=2).isfinite().sum() == 3
    assert filter_logits(logits, top_k=99).isfinite().all()


def test_top_p_is_computed_after_temperature_and_top_k():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    both = filter_logits(logits, temperature=2.0, top_k=2, top_p=0.7)
    assert torch.equal(both, filter_logits(filter_logits(logits / 2, top_k=2), top_p=0.7))


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    uniform = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    tokens = pick_tokens(probabilities.log().expand(10000, 4), uniform)
    assert torch.bincount(tokens, minlength=4).tolist() == [5000, 0, 2000, 3000]


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_a_filtered_token_is_never_drawn_even_at_the_ends(uniform):
    logits = torch.full((1, 6), float("-inf"))
    logits[0, 2], logits[0, 3] = 0.0, 1.0
    assert pick_tokens(logits, torch.tensor([uniform], dtype=torch.float64)).item() == (2 if uniform == 0.0 else 3)
