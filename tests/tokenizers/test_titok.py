import os
import socket

import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.paths import CONFIGS
from vgen.errors import UserError
from vgen.schedules.raster import raster
from vgen.tokenizers.bottleneck import ClusteringQuantizer, GaussianBottleneck
from vgen.tokenizers.maskgit_vqgan import MaskGITDecoder, MaskGITVQGAN
from vgen.tokenizers.titok import TiTok
from vgen.tokenizers.titok_vit import mix_legacy

VIT = {"width": 16, "layers": 1, "heads": 2}
TINY = {
    "image_size": 8,
    "patch_size": 4,
    "num_latent_tokens": 5,
    "token_size": 4,
    "encoder": VIT,
    "decoder": VIT,
    "codebook_size": 32,
    "usage_window": 64,
}
PIXELS = {"base_channels": 8, "multipliers": [1, 1, 1], "num_res_blocks": 1, "z_channels": 6, "norm_groups": 4}
VQGAN = {"image_size": 8, "codebook_size": 12, "usage_window": 64, **PIXELS}
PUBLISHED = {
    "titok_l32": (641_054_735, 32),
    "titok_b64": (204_814_095, 64),
    "titok_s128": (83_674_639, 128),
    "titok_bl64_vq": (390_016_148, 64),
    "titok_bl128_vq": (390_179_988, 128),
    "titok_sl256_vq": (330_260_884, 256),
    "titok_ll32_vae": (606_879_604, 32),
    "titok_bl64_vae": (389_418_100, 64),
    "titok_bl128_vae": (389_581_940, 128),
    "tatitok_bl32_vq": (390_800_532, 32),
    "tatitok_bl64_vq": (390_882_452, 64),
    "tatitok_bl128_vq": (391_046_292, 128),
    "tatitok_bl32_vae": (390_202_484, 32),
    "tatitok_bl64_vae": (390_284_404, 64),
    "tatitok_sl128_vae": (330_275_188, 128),
    "maskgit_vqgan": (54_515_587, 256),
}


def tiny(**options):
    torch.manual_seed(0)
    return TiTok(**(TINY | options))


def two_stage(**options):
    torch.manual_seed(0)
    settings = {"head": "proxy", "proxy_codebook_size": 12, "pixel_decoder": MaskGITDecoder(**PIXELS)}
    return tiny(**settings | options)


def pictures(count=2, size=8):
    return torch.rand(count, 3, size, size) * 2 - 1


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_sizes(name):
    with torch.device("meta"):
        model = instantiate(OmegaConf.load(CONFIGS / "tokenizer" / f"{name}.yaml"))
    parameters, tokens = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.num_tokens == tokens


def test_every_preset_is_tested():
    folder = CONFIGS / "tokenizer"
    presets = {path.stem for path in folder.glob("*titok_*.yaml")} - {"titok_32", "titok_digits"}
    assert presets | {"maskgit_vqgan"} == set(PUBLISHED)


def test_presets_state_every_option():
    keys = {path.stem: set(yaml.safe_load(path.read_text())) for path in (CONFIGS / "tokenizer").glob("*titok_*.yaml")}
    assert len(set(map(frozenset, keys.values()))) == 1


@pytest.mark.parametrize(
    "options", [{}, {"bottleneck": "clustering_vq"}, {"latent_layout": "legacy"}, {"l2_normalize": True}]
)
def test_the_contract_of_tokenizers(options):
    model = tiny(**options).eval()
    pixels = pictures()
    with torch.no_grad():
        ids = model.encode(pixels)
        output = model(pixels)
        assert torch.allclose(model.decode(ids), output.reconstruction, atol=1e-5)
        assert torch.equal(model.reconstruct(pixels), model.decode(ids))
        assert torch.equal(ids, torch.cat([model.encode(picture[None]) for picture in pixels]))
    assert model.grid == (5,)
    assert ids.shape == (2, 5)
    assert ids.dtype == torch.int64
    assert torch.equal(output.ids, ids)
    assert output.reconstruction.shape == pixels.shape
    assert model.codebook.shape == (32, 4)
    assert raster(grid=model.grid).num_tokens == model.num_tokens


def test_gradient_reaches_every_parameter():
    for model in (tiny(), two_stage()):
        pixels = pictures()
        output = model(pixels)
        (F.mse_loss(output.reconstruction, pixels) + sum(output.losses.values())).backward()
        still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # The mixed codes of the untrained two-stage model may leave parts of the pixel codebook without a gradient.
        assert still == []
        assert model.last_layer.grad is not None


def test_first_stage_predicts_and_second_stage_mixes_codes():
    model = two_stage()
    assert model.predict(pictures()).logits.shape == (2, 12, 2, 2)
    logits = torch.full((1, 12, 2, 2), -1e4)
    logits[:, 3] = 1e4
    codes = model.pixel_quantize.embedding.weight
    assert torch.allclose(model.proxy_vectors(logits)[0, :, 1, 1], codes[3])
    flat = torch.zeros(1, 12, 2, 2)
    assert torch.allclose(model.proxy_vectors(flat)[0, :, 0, 0], codes.mean(0), atol=1e-6)
    hard = two_stage(proxy_mix="hard")
    assert torch.equal(hard.proxy_vectors(logits)[0, :, 0, 0], hard.pixel_quantize.embedding.weight[3])
    bare = tiny(head="proxy", proxy_codebook_size=12)
    assert bare.predict(pictures()).logits.shape == (2, 12, 2, 2)
    with pytest.raises(UserError, match="no pixel decoder"):
        bare.decode(torch.zeros(1, 5, dtype=torch.int64))


def test_legacy_layout_reads_memory_and_is_no_transpose():
    states = torch.arange(12.0).view(1, 3, 4)
    mixed = mix_legacy(states)
    assert mixed.shape == (1, 4, 3)
    assert mixed[0, 2, 1] == 2 * 3 + 1
    assert not torch.equal(mixed, states.transpose(1, 2))


def test_gaussian_has_no_ids_but_reconstructs_its_mean():
    model = tiny(bottleneck="gaussian", codebook_size=0, kl_weight=0.5).train()
    pixels = pictures()
    output = model(pixels)
    assert output.ids.shape == (2, 0)
    assert torch.allclose(output.losses["kl"], 0.5 * model.posterior(pixels).kl().sum(1).mean())
    assert not torch.equal(model(pixels).reconstruction, output.reconstruction)
    with torch.no_grad():
        assert torch.allclose(model.eval()(pixels).reconstruction, model.reconstruct(pixels))
    for call in (lambda: model.encode(pixels), lambda: model.codebook):
        with pytest.raises(UserError, match="no token ids"):
            call()
    with pytest.raises(UserError, match="has a codebook"):
        tiny().posterior(pixels)


def test_kl_of_a_normal_distribution():
    latent = GaussianBottleneck()(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
    assert latent.kl().item() == pytest.approx(0.5)
    extreme = GaussianBottleneck()(torch.tensor([0.0, 99.0]).view(1, 2, 1, 1))
    assert extreme.logvar.item() == 20.0


def test_text_changes_the_picture_and_must_fit():
    model = tiny(text_length=3, text_dim=6).eval()
    ids, text = torch.zeros(2, 5, dtype=torch.int64), torch.randn(2, 3, 6)
    with torch.no_grad():
        assert not torch.allclose(model.decode(ids, text), model.decode(ids))
        assert torch.equal(model.decode(ids), model.decode(ids, torch.zeros_like(text)))
    with pytest.raises(UserError, match="text_length=3"):
        model.decode(ids, text[:, :2])


def test_clustering_moves_unused_codes_to_features_in_training_only():
    torch.manual_seed(0)
    quantizer = ClusteringQuantizer(codebook_size=16, codebook_dim=3, l2_normalize=False, usage_window=8)
    features = torch.randn(4, 3, 1, 8) + 5
    start = quantizer.embedding.weight.detach().clone()
    quantizer.eval()(features)
    assert torch.equal(quantizer.embedding.weight, start)
    quantizer.train()
    quantizer.embedding.weight.requires_grad_(False)
    quantizer(features)
    assert torch.equal(quantizer.embedding.weight, start)
    quantizer.embedding.weight.requires_grad_(True)
    for _ in range(3):
        quantizer(features)
    rows = features.permute(0, 2, 3, 1).flatten(0, 2)
    far = torch.cdist(start, rows).amin(1)
    assert (torch.cdist(quantizer.embedding.weight.detach(), rows).amin(1) < 0.1 * far).sum() > 12


@pytest.mark.parametrize("seed", range(4))
def test_clustering_keeps_the_graph_of_the_pass(seed):
    torch.manual_seed(seed)
    quantizer = ClusteringQuantizer(codebook_size=16, codebook_dim=3, l2_normalize=True, usage_window=8).train()
    start = quantizer.embedding.weight.detach().clone()
    plain = start.clone().requires_grad_()
    features = torch.randn(2, 3, 1, 8)
    quantized = quantizer(features)
    quantized.losses["vq"].backward()
    rows = F.normalize(features.permute(0, 2, 3, 1).flatten(0, 2), dim=-1)
    F.mse_loss(F.normalize(plain, dim=-1)[quantized.ids.flatten()], rows).backward()
    assert torch.allclose(quantizer.embedding.weight.grad, plain.grad, atol=1e-6)
    assert not torch.equal(quantizer.embedding.weight, start)


@pytest.mark.slow
def test_compiled_training_gives_the_same_gradients_and_names(traced_only):
    pixels, results = pictures(), []
    for compiled in (False, True):
        model = tiny().train()
        if compiled:
            model.compile_parts()
        output = model(pixels)
        (F.mse_loss(output.reconstruction, pixels) + sum(output.losses.values())).backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    assert results[0].keys() == results[1].keys()
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-6) for name in results[0])


def _clustering(rank, port, features, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(_moved(features[2 * rank : 2 * rank + 2]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _moved(features):
    torch.manual_seed(0)
    quantizer = ClusteringQuantizer(codebook_size=16, codebook_dim=3, l2_normalize=False, usage_window=8).train()
    for _ in range(2):
        quantizer(features)
    return {name: value.detach() for name, value in quantizer.state_dict().items() if name != "codebook_used"}


@pytest.mark.slow
def test_two_processes_move_the_codes_as_one_does(tmp_path):
    features = torch.randn(4, 3, 1, 8)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_clustering, (port, features, str(tmp_path)), nprocs=2)
    expected = _moved(features)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            assert torch.allclose(found[name], value, atol=1e-6), (rank, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "multiple of the patch size 3"),
        ({"codebook_size": 0}, "codebook_size=0"),
        ({"bottleneck": "gaussian"}, "codebook_size has no effect"),
        ({"bottleneck": "gaussian", "codebook_size": 0, "head": "proxy", "proxy_codebook_size": 3}, "two-stage"),
        ({"bottleneck": "fsq"}, "bottleneck=fsq"),
        ({"latent_layout": "old"}, "latent_layout=old"),
        ({"head": "proxy"}, "proxy_codebook_size"),
        ({"proxy_codebook_size": 12}, "no effect with head=pixel"),
        ({"encoder": {"width": 16, "layers": 1}}, "width, layers and heads"),
        ({"decoder": {**VIT, "heads": 3}}, "3 attention heads"),
        ({"num_latent_tokens": 0}, "num_latent_tokens"),
        ({"commitment_weight": -1}, "commitment_weight=-1"),
    ],
)
def test_contradictions_are_named(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)


def test_a_pixel_decoder_of_another_stride_is_refused():
    with pytest.raises(UserError, match="patch_size=4"):
        two_stage(patch_size=2)


def test_wrong_images_and_ids_are_named():
    model = tiny()
    for pixels in (pictures(size=12), pictures()[0], torch.zeros(1, 1, 8, 8)):
        with pytest.raises(UserError, match="8 x 8 pixels"):
            model.encode(pixels)
    for ids in (torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.int64)):
        with pytest.raises(UserError, match="exactly 5 ids"):
            model.decode(ids)


def test_gradient_checkpointing_and_bfloat16_change_no_results():
    grads = []
    for flag in (False, True):
        model = tiny(gradient_checkpointing=flag)
        torch.manual_seed(1)
        output = model(pictures())
        (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))
    model = two_stage()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pictures())
    assert output.reconstruction.dtype == torch.float32
    assert {value.dtype for value in output.losses.values()} == {torch.float32}


def test_maskgit_vqgan_takes_any_size_that_divides_by_the_stride():
    torch.manual_seed(0)
    model = MaskGITVQGAN(**VQGAN).eval()
    pixels = torch.rand(2, 3, 8, 16) * 2 - 1
    with torch.no_grad():
        ids = model.encode(pixels)
        assert torch.allclose(model.decode(ids, grid=(2, 4)), model(pixels).reconstruction, atol=1e-5)
    with pytest.raises(UserError, match="do not fill"):
        model.decode(ids)
    with pytest.raises(UserError, match="stride 4"):
        model.encode(pixels[..., :6])
    with pytest.raises(UserError, match="image_size=10"):
        MaskGITVQGAN(**VQGAN | {"image_size": 10})


def test_a_width_change_drops_the_block_input():
    """The published weights need result = h + shortcut(h); the usual x + h would give another network."""
    from vgen.tokenizers.maskgit_vqgan import ResBlock

    block = ResBlock(4, 8, groups=2)
    with torch.no_grad():
        block.conv2.weight.zero_()
        assert not block(torch.randn(1, 4, 4, 4)).any()
