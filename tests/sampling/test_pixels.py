import pytest
import torch

from tests.checkpoints.helpers import tiny_release
from vgen.checkpoints.release import load_tokenizer
from vgen.errors import UserError
from vgen.sampling.pixels import PixelDecoder, PixelSettings


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return tiny_release(tmp_path_factory.mktemp("release"))


def test_options_of_the_decoder_change_pixels_by_rounding_only(release):
    tokenizer = load_tokenizer(release)
    ids = torch.randint(tokenizer.codebook_size, (2, tokenizer.num_tokens))
    with torch.inference_mode():
        expected = tokenizer.decode(ids)
    plain = PixelDecoder(tokenizer, PixelSettings())(ids, torch.arange(2), 0)
    assert torch.equal(plain, expected)
    last = PixelDecoder(load_tokenizer(release), PixelSettings(channels_last=True))(ids, torch.arange(2), 0)
    torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)
    assert last.is_contiguous()
    half = PixelDecoder(tokenizer, PixelSettings(dtype="bfloat16"))(ids, torch.arange(2), 0)
    assert half.dtype == torch.float32
    assert not torch.equal(half, expected)
    assert (half - expected).norm() / expected.norm() < 2e-2
    with pytest.raises(UserError, match=r"pixels\.dtype"):
        PixelSettings(dtype="float8")
