import torch

from vgen.random import keyed_normal, keyed_permutation, keyed_uniform


def test_values_depend_on_keys_only():
    table = keyed_uniform(7, torch.arange(50)[:, None], torch.arange(30))
    assert torch.equal(table[13], keyed_uniform(7, torch.tensor(13), torch.arange(30)))
    assert table[13, 4] == keyed_uniform(7, 13, 4)
    assert len({keyed_uniform(*k).item() for k in [(1, 2), (2, 1), (12,), (0, 12), (1, 2, 0)]}) == 5


def test_values_are_uniform_and_uncorrelated_along_every_key():
    table = keyed_uniform(3, torch.arange(300)[:, None], torch.arange(300))
    assert table.min() >= 0
    assert table.max() < 1
    assert abs(table.mean() - 0.5) < 0.005
    assert (torch.histc(table, 20, 0, 1) / table.numel() - 0.05).abs().max() < 0.004
    centred = table - 0.5
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs((a * b).mean() * 12) < 0.02
    assert abs((centred * (keyed_uniform(4, torch.arange(300)[:, None], torch.arange(300)) - 0.5)).mean() * 12) < 0.02


def test_keys_beyond_32_bits_count():
    assert keyed_uniform(1 << 40) != keyed_uniform(1 << 41)


def test_permutation_is_a_bijection_and_keyed():
    order = keyed_permutation(100, 5, 6)
    assert torch.equal(order.sort().values, torch.arange(100))
    assert torch.equal(order, keyed_permutation(100, 5, 6))
    assert not torch.equal(order, keyed_permutation(100, 5, 7))


def test_normal_values_are_normal_and_keyed():
    table = keyed_normal(5, torch.arange(300)[:, None], torch.arange(300))
    assert table.dtype == torch.float32
    assert torch.equal(table[7], keyed_normal(5, 7, torch.arange(300)))
    quantiles = torch.special.ndtr(table)
    assert (torch.histc(quantiles, 20, 0, 1) / table.numel() - 0.05).abs().max() < 0.004
    assert abs((table[1:] * table[:-1]).mean()) < 0.02
    assert table.isfinite().all()


def test_normal_values_stay_those_of_earlier_versions():
    # A job that is resumed by another version must not change its noise.
    first, second = keyed_uniform(5, torch.arange(4), 7, 0), keyed_uniform(5, torch.arange(4), 7, 1)
    expected = (-2.0 * torch.log1p(-first)).sqrt() * torch.cos(2.0 * torch.pi * second)
    assert torch.equal(keyed_normal(5, torch.arange(4), 7), expected.float())
