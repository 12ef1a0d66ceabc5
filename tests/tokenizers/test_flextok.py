import json
from functools import partial

import pytest
import torch

from tests.paths import ROOT
from tests.training.helpers import composed
from vgen.checkpoints.flextok import to_published
from vgen.errors import UserError
from vgen.tokenizers.autoencoder_kl import AutoencoderKL
from vgen.tokenizers.flextok import FlexTok
from vgen.tokenizers.flow import FlowSampling
from vgen.tokenizers.flow_guidance import FlowGuidance
from vgen.tokenizers.nested_dropout import kept_lengths
from vgen.training.settings import make, resolve

GOLDEN = ROOT / "tests" / "golden" / "flextok"
VAE = {"image_size": 8, "latent_channels": 3, "block_channels": [8, 8], "layers_per_block": 1, "norm_groups": 4}
WIDE = FlowSampling(steps=3, guidance=FlowGuidance(kind="apg", scale=4.0))


def tiny(**options):
    """A FlexTok of 6 tokens whose zero-initialised layers are random."""
    torch.manual_seed(0)
    arguments = {
        "vae": AutoencoderKL(**VAE),
        "num_tokens": 6,
        "levels": (4, 3, 3),
        "patch": 1,
        "encoder": {"dim": 16, "depth": 2, "head_dim": 8},
        "decoder": {"dim": 16, "depth": 2, "head_dim": 8, "time_features": 16},
        "decoding": WIDE,
    }
    tokenizer = FlexTok(**(arguments | options)).eval()
    for parameter in tokenizer.decoder.parameters():
        if parameter.count_nonzero() == 0:
            torch.nn.init.normal_(parameter, std=0.3)
    return tokenizer.requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny()


@pytest.fixture
def pixels():
    torch.manual_seed(1)
    return torch.rand(3, 3, 8, 8) * 2 - 1


@pytest.mark.parametrize("manifest", ["d12_d12_in1k", "d18_d18_in1k", "d18_d28_dfn"])
def test_presets_have_the_published_tensors(manifest):
    preset = "flextok_" + "_".join(manifest.split("_")[:2])
    with torch.device("meta"):
        network = make(resolve(composed(f"tokenizer={preset}"))["tokenizer"], "tokenizer")
    published = json.loads((GOLDEN / f"manifest_flextok_{manifest}.json").read_text())
    ours = {name: list(value.shape) for name, value in to_published(network.state_dict()).items()}
    assert ours == {name: shape for name, shape in published.items() if not name.startswith("__")}
    assert (network.image_size, network.grid, network.codebook_size) == (256, (256,), 64000)


@pytest.mark.parametrize(("channels", "preset"), [(4, "vae_c4"), (8, "vae_c8"), (16, "vae_c16")])
def test_vae_presets_have_the_published_tensors(channels, preset):
    with torch.device("meta"):
        network = make(resolve(composed(f"tokenizer={preset}"))["tokenizer"], "tokenizer")
    published = json.loads((GOLDEN / f"manifest_flextok_vae_c{channels}.json").read_text())
    ours = {name: list(value.shape) for name, value in network.state_dict().items()}
    assert ours == {name: shape for name, shape in published.items() if not name.startswith("__")}


def test_tokens_do_not_depend_on_later_registers(tokenizer, pixels):
    ids = tokenizer.encode(pixels)
    assert ids.shape == (3, 6)
    shorter = tiny(num_tokens=4)
    state = tokenizer.encoder.state_dict()
    shorter.encoder.load_state_dict(state | {"registers": state["registers"][:4]})
    shorter.vae.load_state_dict(tokenizer.vae.state_dict())
    assert torch.equal(shorter.encode(pixels), ids[:, :4])


@pytest.mark.parametrize("length", range(1, 7))
def test_the_short_sequence_equals_the_plain_one(tokenizer, pixels, length):
    ids, noise = tokenizer.encode(pixels)[:, :length], torch.randn(3, 3, 4, 4)
    plain = tokenizer.decode_latents(ids, noise, plain=True)
    assert torch.allclose(tokenizer.decode_latents(ids, noise), plain, atol=1e-5)
    # The padding ids of a longer list do not matter.
    padded = torch.cat([ids, torch.full((3, 6 - length), 7)], dim=1)
    keep = torch.full((3,), length)
    assert torch.allclose(tokenizer.decode_latents(padded, noise, keep=keep), plain, atol=1e-5)


def test_different_lengths_in_one_batch(tokenizer, pixels):
    ids, noise, keep = tokenizer.encode(pixels), torch.randn(3, 3, 4, 4), torch.tensor([6, 1, 4])
    plain = tokenizer.decode_latents(ids, noise, keep=keep, plain=True)
    assert torch.allclose(tokenizer.decode_latents(ids, noise, keep=keep), plain, atol=1e-5)
    alone = [tokenizer.decode_latents(ids[i : i + 1, :k], noise[i : i + 1]) for i, k in enumerate(keep.tolist())]
    assert torch.allclose(torch.cat(alone), plain, atol=1e-5)
    assert not torch.allclose(tokenizer.decode_latents(ids, noise), plain, atol=1e-2)


def test_a_picture_depends_on_seed_and_sample_only(tokenizer, pixels):
    ids = tokenizer.encode(pixels)
    index = torch.tensor([5, 2**40, 0])
    together = tokenizer.decode(ids, sample_index=index)
    alone = torch.cat([tokenizer.decode(ids[i : i + 1], sample_index=index[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(tokenizer.decode(ids, sample_index=index, seed=1), together, atol=1e-2)
    assert not torch.allclose(tokenizer.decode(ids, sample_index=index + 1), together, atol=1e-2)


def test_without_indices_decoding_is_a_function_of_the_ids(tokenizer, pixels):
    ids = tokenizer.encode(pixels)
    together = tokenizer.decode(ids)
    assert torch.allclose(tokenizer.decode(ids.flip(0)).flip(0), together, atol=1e-5)
    same = tokenizer.noise(torch.zeros(2, dtype=torch.int64), 0)
    assert torch.equal(same[0], same[1])
    many = torch.randint(0, 36, (2000, 6)).unique(dim=0)
    from vgen.tokenizers.flextok import _content_key

    assert len(_content_key(many).unique()) == len(many)


def test_it_runs_in_bfloat16_with_a_float32_vae(tokenizer, pixels):
    want = tokenizer.decode(tokenizer.encode(pixels)[:, :3])
    with torch.autocast("cpu", torch.bfloat16):
        ids = tokenizer.encode(pixels)
        got = tokenizer.decode(ids[:, :3])
    assert got.dtype == torch.float32
    assert (ids == tokenizer.encode(pixels)).float().mean() > 0.7
    assert got.shape == want.shape
    assert got.isfinite().all()


def test_noise_is_standard_normal(tokenizer):
    noise = tokenizer.noise(torch.arange(500), 3)
    assert noise.shape == (500, 3, 4, 4)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_the_vae_stays_frozen(tokenizer):
    fresh = tiny().train()
    assert fresh.training
    assert not fresh.vae.training
    assert not any(p.requires_grad for p in fresh.vae.parameters())


def test_registers_start_with_the_spread_asked_for():
    wide = {"dim": 64, "depth": 1, "register_std": 0.5}
    for options in ({"encoder": wide}, {"decoder": wide}):
        fresh = tiny(num_tokens=64, **options)
        encoder, decoder = fresh.encoder.registers.std(), fresh.decoder.register_positions.std()
        asked, other = (encoder, decoder) if "encoder" in options else (decoder, encoder)
        assert asked.item() == pytest.approx(0.5, rel=0.1)
        assert other.item() == pytest.approx(0.02, rel=0.1)


def test_bad_input(tokenizer, pixels):
    ids = tokenizer.encode(pixels)
    for wrong in (torch.cat([ids, ids], dim=1), ids[:, :0], ids[0]):
        with pytest.raises(UserError, match="1 <= k <= 6"):
            tokenizer.decode(wrong)
    with pytest.raises(UserError, match=r"0\.\.35"):
        tokenizer.decode(ids + 36)
    with pytest.raises(UserError, match="8, 8"):
        tokenizer.encode(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, "tokenizer.patch=3"),
        ({"encoder": {"dim": 16, "depth": 1, "head_dim": 7}}, "head_dim"),
        ({"encoder": {"dim": 16, "depth": 1, "heads": 2}}, r"tokenizer\.encoder.*heads"),
        ({"encoder": {"dim": 16, "depth": 1, "head_dim": 8, "visibility": "blind"}}, "visibility=blind"),
        ({"decoder": {"dim": 16, "depth": 1, "head_dim": 8, "positions": "rope"}}, "positions=rope"),
        ({"num_tokens": 0}, "num_tokens=0"),
        ({"decoder": {"dim": 16, "depth": 1, "head_dim": 8, "register_std": 0.0}}, "register_std=0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)


@pytest.mark.parametrize("most", [1, 2, 6, 16])
@pytest.mark.parametrize("mode", ["uniform", "pow2", "uniform_pow2"])
def test_kept_lengths(mode, most):
    lengths = kept_lengths(torch.arange(1000) / 1000, most, mode)
    assert lengths.min() == 1
    assert lengths.max() == most
    powers = {2**i for i in range(10)} | {most}
    assert mode == "uniform" or set(lengths.tolist()) <= powers


@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_recomputed_blocks_give_the_same_gradients(kind, pixels):
    gradients = []
    for recompute in (False, True):
        options = {"dim": 16, "depth": 2, "head_dim": 8, "positions": kind, "gradient_checkpointing": recompute}
        network = tiny(encoder=options, decoder=options | {"time_features": 16}).train().requires_grad_(True)
        codes, _ = network.fsq(network.encoder(network.latents(pixels)))
        latents = torch.ones(3, 3, 4, 4)
        keep, null = torch.tensor([6, 2, 1]), torch.tensor([False, True, False])
        output = network.decoder(latents, torch.full((3,), 0.5), network.decoder.condition(codes, keep, null))
        output.velocity.square().mean().backward()
        gradients.append([p.grad for p in [*network.encoder.parameters(), *network.decoder.parameters()]])
        assert all(gradient is not None for gradient in gradients[-1])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_compiled_training_gives_the_same_gradients_and_compiles_once_per_kind_of_block(pixels, monkeypatch):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    # The graphs are what is counted; to turn them into machine code takes minutes on two cores.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    # More blocks than variants that dynamo keeps of one function.
    options = {"dim": 16, "depth": torch._dynamo.config.recompile_limit + 1, "head_dim": 8}
    gradients = []
    for compiled in (False, True):
        network = tiny(encoder=options, decoder=options | {"time_features": 16}).train().requires_grad_(True)
        names = list(network.state_dict())
        if compiled:
            network.compile_parts()
        for seed in range(2):
            torch.manual_seed(seed)
            network.zero_grad()
            codes, _ = network.fsq(network.encoder(network.latents(pixels)), torch.rand(3) < 0.5)
            condition = network.decoder.condition(codes, torch.randint(1, 7, (3,)), torch.rand(3) < 0.5)
            network.decoder(torch.randn(3, 3, 4, 4), torch.rand(3), condition).velocity.square().mean().backward()
        assert list(network.state_dict()) == names
        gradients.append([p.grad for p in [*network.encoder.parameters(), *network.decoder.parameters()]])
    for eager, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, eager)
    assert counters["stats"]["unique_graphs"] == 2
