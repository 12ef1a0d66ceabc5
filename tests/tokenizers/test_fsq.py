import pytest
import torch

from vgen.errors import UserError
from vgen.tokenizers.fsq import FSQ


@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5, 5), (2, 3), (4,)])
def test_every_id_has_its_own_code_and_comes_back(levels):
    fsq = FSQ(levels=levels)
    codes = fsq.codebook
    assert codes.shape == (fsq.codebook_size, len(levels))
    assert torch.equal(fsq.ids(codes), torch.arange(fsq.codebook_size))
    assert codes.unique(dim=0).shape == codes.shape
    assert codes.abs().max() <= 1


def test_a_video_grid_is_quantized_like_a_list():
    fsq, z = FSQ(levels=(5, 4, 3)), torch.randn(2, 3, 4, 4, 3)
    codes, ids = fsq(z)
    flat_codes, flat_ids = fsq(z.reshape(-1, 3))
    assert torch.equal(codes.reshape(-1, 3), flat_codes)
    assert torch.equal(ids.flatten(), flat_ids)


def test_the_gradient_is_that_of_the_bound():
    fsq = FSQ(levels=(8, 5))
    z = torch.randn(7, 2, requires_grad=True)
    (got,) = torch.autograd.grad(fsq(z)[0].sum(), z)
    (want,) = torch.autograd.grad((fsq.bound(z) / (fsq.count // 2)).sum(), z)
    assert torch.allclose(got, want)
    assert got.abs().min() > 0


def test_unrounded_samples_keep_their_ids():
    fsq, z = FSQ(levels=(8, 5)), torch.randn(4, 6, 2)
    codes, ids = fsq(z)
    mixed, same = fsq(z, torch.tensor([True, False, True, False]))
    assert torch.equal(ids, same)
    assert torch.equal(mixed[1::2], codes[1::2])
    assert torch.allclose(mixed[::2], fsq.bound(z[::2]) / (fsq.count // 2))


def test_it_stays_float32_under_autocast_and_has_no_state():
    fsq = FSQ(levels=(8, 8))
    z = torch.randn(50, 2)
    with torch.autocast("cpu", torch.bfloat16):
        codes, ids = fsq(z)
    assert codes.dtype == torch.float32
    assert torch.equal(ids, fsq(z)[1])
    assert not fsq.state_dict()


def test_bad_levels():
    with pytest.raises(UserError, match="at least 2 levels"):
        FSQ(levels=[8, 1])
