import pytest
import torch
from torch import nn

from vgen.errors import UserError
from vgen.generators.conditioning import TextContext
from vgen.generators.transformer import Transformer
from vgen.sampling.decode import decode
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.raster import raster

PLAN = raster(grid=(6,))
INDEX = torch.arange(3)


def tiny(**options):
    torch.manual_seed(0)
    settings = {"dim": 32, "depth": 2, "heads": 2, "ffn_multiple_of": 8, "rope": "none", "positions": "own"} | options
    condition = TextContext(caption_dim=5, num_features=4, dim=32)
    generator = Transformer(vocab_size=11, grid=(6,), condition=condition, **settings).eval()
    for parameter in generator.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return generator


def captions(valid=(4, 2, 1)):
    torch.manual_seed(1)
    features = torch.randn(3, 4, 5)
    for caption, count in zip(features, valid, strict=True):
        caption[count:] = 0
    return features


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("qk_norm", [None, "rms"])
def test_decoding_sees_what_training_saw(scale, qk_norm):
    """Pass by pass with cached text against the teacher-forced logits of the tokens drawn."""
    generator, text, traced = tiny(qk_norm=qk_norm), captions(), []
    sampling = Sampling(guidance=Guidance(scale=scale))
    ids = decode(
        generator, PLAN, text, sampling=sampling, sample_index=INDEX, trace=lambda _, logits: traced.append(logits)
    )
    expected = generator.logits(ids, text, PLAN)
    if scale != 1.0:
        null = generator.logits(ids, text, PLAN, drop=torch.ones(3, dtype=torch.bool))
        expected = null + scale * (expected - null)
    torch.testing.assert_close(torch.cat(traced, dim=1), expected, atol=2e-5, rtol=1e-4)


def test_every_block_attends_to_text_and_padding_is_not_seen():
    generator, text = tiny(), captions()
    ids = torch.randint(11, (3, 6))
    base = generator.logits(ids, text, PLAN)
    other = text.clone()
    other[:, 0] += 1
    assert ((generator.logits(ids, other, PLAN) - base).abs().amax((1, 2)) > 1e-3).all()
    # A caption without its padding gives the same.
    short = Transformer(
        vocab_size=11,
        grid=(6,),
        condition=TextContext(caption_dim=5, num_features=2, dim=32),
        dim=32,
        depth=2,
        heads=2,
        ffn_multiple_of=8,
        rope="none",
        positions="own",
    ).eval()
    short.load_state_dict(generator.state_dict())
    torch.testing.assert_close(short.logits(ids[1:], text[1:, :2], PLAN), base[1:])


def test_an_empty_caption_is_defined():
    generator = tiny()
    ids = torch.randint(11, (3, 6))
    assert generator.logits(ids, captions(valid=(4, 1, 0)), PLAN).isfinite().all()


def test_the_null_caption_is_the_same_for_every_caption():
    generator, text = tiny(), captions()
    ids = torch.randint(11, (1, 6)).expand(3, -1)
    logits = generator.logits(ids, text, PLAN, drop=torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(logits, logits[:1].expand(3, -1, -1))


def test_captions_may_be_numbered():
    generator, text = tiny(), captions()
    ids = torch.randint(11, (4, 6))
    with pytest.raises(UserError, match="give text_features"):
        generator.logits(ids, torch.tensor([0, 1, 2, 3]), PLAN)
    generator.condition.attach(text)
    assert generator.condition.num_classes == 3
    numbered = generator.logits(ids, torch.tensor([2, 0, 1, 3]), PLAN)
    assert torch.equal(numbered[:3], generator.logits(ids, text[[2, 0, 1, 0]], PLAN)[:3])
    null = generator.logits(ids, text[[0, 0, 0, 0]], PLAN, drop=torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(numbered[3], null[3])
    assert "captions" not in "".join(generator.state_dict())


def test_the_blocks_have_sixteen_times_the_square_of_their_width():
    with torch.device("meta"):
        generator = tiny_meta(dim=768, heads=12)
    per_block = sum(p.numel() for p in generator.layers.parameters() if p.dim() > 1)
    assert per_block == pytest.approx(16 * 768**2, rel=0.001)


def tiny_meta(**sizes):
    condition = TextContext(caption_dim=5, num_features=4, dim=sizes["dim"])
    return Transformer(vocab_size=11, grid=(6,), condition=condition, depth=1, ffn_multiple_of=8, **sizes)


def test_what_does_not_fit_is_named():
    generator = tiny()
    with pytest.raises(UserError, match=r"shape \[3, 4, 6\] do not fit"):
        generator.condition.attach(torch.randn(3, 4, 6))
    with pytest.raises(UserError, match="no place for cross-attention"):
        tiny(norm_position="post")
    with pytest.raises(UserError, match="without cross-attention"):
        tiny(adaln=["step"])
