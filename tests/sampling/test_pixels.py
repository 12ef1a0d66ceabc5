import pytest
import torch

from tests.checkpoints.helpers import tiny_release
from vgen.checkpoints.release import load_tokenizer
from vgen.errors import UserError
from vgen.sampling.pixels import PixelDecoder, PixelSettings
from vgen.tokenizers.maskgit_vqgan import MaskGITVQGAN
from vgen.tokenizers.vqgan import VQGAN


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return tiny_release(tmp_path_factory.mktemp("release"))


def relative(pixels, expected):
    return float((pixels - expected).norm() / expected.norm())


@torch.inference_mode()
def autocast(tokenizer, ids):
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        return tokenizer.decode(ids)


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
    with pytest.raises(UserError, match=r"pixels\.beside_tokens=perhaps is unknown; choose true or false"):
        PixelSettings(beside_tokens="perhaps")


@pytest.mark.parametrize("kind", ["vqgan", "maskgit"])
def test_a_decoder_held_in_bfloat16_leaves_the_encoder_as_it_is(kind):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "base_channels": 32, "codebook_size": 64}
    if kind == "vqgan":
        tokenizer = VQGAN(encoder_multipliers=[1, 2], decoder_multipliers=[1, 2], z_channels=32, **sizes)
    else:
        tokenizer = MaskGITVQGAN(multipliers=[1, 2], z_channels=32, **sizes)
    tokenizer.eval()
    ids, pixels = torch.randint(64, (3, 64)), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        expected, encoded = tokenizer.decode(ids), tokenizer.encode(pixels)
    usual = relative(autocast(tokenizer, ids), expected)
    decode = PixelDecoder(tokenizer, PixelSettings("bfloat16", channels_last=True))
    half = decode(ids, torch.arange(3), 0)
    assert tokenizer.last_layer.dtype == torch.bfloat16
    assert tokenizer.codebook.dtype == half.dtype == torch.float32
    assert half.is_contiguous()
    assert 0 < relative(half, expected) < 1.5 * usual < 0.1
    with torch.inference_mode():
        assert torch.equal(tokenizer.encode(pixels), encoded)


def test_smaller_batches_fill_up_what_was_compiled(release, monkeypatch):
    sizes = []

    def compiled(function, **options):
        def run(ids, *arguments):
            sizes.append(len(ids))
            return function(ids, *arguments)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    tokenizer = load_tokenizer(release)
    ids = torch.randint(tokenizer.codebook_size, (4, tokenizer.num_tokens))
    decode = PixelDecoder(tokenizer, PixelSettings(compile=True))
    whole = decode(ids, torch.arange(4), 0)
    assert torch.equal(decode(ids[:3], torch.arange(3), 0), whole[:3])
    decode.forget()
    decode(ids[:2], torch.arange(2), 0)
    assert sizes == [4, 4, 2]
    with torch.inference_mode():
        assert torch.equal(whole, tokenizer.decode(ids))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_fast_settings_change_pixels_by_rounding_only_on_a_gpu(compiled):
    torch.manual_seed(0)
    multipliers = {"encoder_multipliers": [1, 2, 2], "decoder_multipliers": [1, 2, 2]}
    tokenizer = VQGAN(image_size=64, base_channels=64, codebook_size=256, **multipliers).cuda().eval()
    ids = torch.randint(256, (8, 256), device="cuda")
    with torch.inference_mode():
        expected = tokenizer.decode(ids)
    usual = relative(autocast(tokenizer, ids), expected)
    decode = PixelDecoder(tokenizer, PixelSettings("bfloat16", channels_last=True, compile=compiled))
    index = torch.arange(8, device="cuda")
    fast = decode(ids, index, 0)
    assert 0 < relative(fast, expected) < 1.5 * usual < 0.15
    assert tokenizer.decoder.norm_out.fused
    assert torch.equal(decode(ids, index, 0), fast)
