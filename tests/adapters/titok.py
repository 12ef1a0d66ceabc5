"""Golden cases of TiTok, TA-TiTok and MaskGIT-VQGAN.

Losses go to titok_losses.py, recipes to titok_recipes.py, generators to maskgen.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from adapters import EXACT, Case, Check, Tolerance, UnknownCase, compare, compare_manifest, count_parameters
from adapters.maskgen import is_maskgen
from adapters.maskgen import run_manifest as run_maskgen
from adapters.titok_losses import run_discriminator_manifest, run_losses
from adapters.titok_recipes import run_recipes
from torch import Tensor, nn

from vgen.checkpoints.convert import load_strict
from vgen.checkpoints.release import build
from vgen.checkpoints.titok import CONFIGS, to_ours, to_published
from vgen.losses.tokens import token_cross_entropy
from vgen.tokenizers.bottleneck import ClusteringQuantizer
from vgen.tokenizers.maskgit_vqgan import Encoder, MaskGITDecoder, MaskGITVQGAN
from vgen.tokenizers.quantize import VectorQuantizer
from vgen.tokenizers.titok import TiTok


def run(case: Case) -> list[Check]:
    """Find out what a case is from its content and run it."""
    names = set(case.data) if case.is_manifest else set(case.state)
    if "optimizer_groups" in case.data:
        return run_recipes(case)
    if "block_in.0.weight" in names:
        return run_discriminator_manifest(case)
    if case.is_manifest and is_maskgen(names):
        return run_maskgen(case)
    if case.is_manifest and names & {"latent_tokens", "quantize.embedding.weight"}:
        return run_manifest(case)
    if any(name.startswith("discriminator.") for name in names):
        return run_losses(case)
    if "latent_tokens" in names:
        return run_titok(case)
    if names and names <= {"embedding.weight", "embed_prob"}:
        return run_clustering(case)
    if any(name.startswith(("encoder.down.", "decoder.up.")) for name in names):
        return run_vqgan(case)
    raise UnknownCase("neither a TiTok, MaskGIT-VQGAN, quantizer, loss, recipe nor one of their manifests")


def check(case: Case, name: str, got: Tensor) -> Check:
    """Compare as the cases state it: rtol per element and an atol relative to the tensor's largest magnitude."""
    want = case.outputs[name]
    if not want.is_floating_point():
        return compare(name, got, want, EXACT)
    stated = case.tolerance("float outputs", "rtol", default=Tolerance(1e-5, 1e-4))
    largest = want.abs().max().item() if want.numel() else 0.0
    tolerance = Tolerance((stated.atol or 1e-5) * max(largest, 1e-12), stated.rtol or 1e-4)
    return compare(name, got.reshape(want.shape) if got.numel() == 1 else got, want, tolerance)


def check_all(case: Case, got: Mapping[str, Tensor]) -> list[Check]:
    return [check(case, name, value) for name, value in got.items() if name in case.outputs]


# TiTok


def titok_options(case: Case) -> dict[str, Any]:
    """Our constructor arguments for the original's configuration and the shapes of its weights."""
    config, state = case.config, case.state
    gaussian = config.get("quantize_mode", "vq") == "vae"
    legacy = config.get("is_legacy", True)
    patch = state["encoder.patch_embed.weight"].shape[-1]
    options: dict[str, Any] = {
        "image_size": config["image_size"],
        "patch_size": patch,
        "num_latent_tokens": len(state["latent_tokens"]),
        "token_size": state["decoder.decoder_embed.weight"].shape[1],
        "encoder": _vit(case, "encoder"),
        "decoder": _vit(case, "decoder"),
        "codebook_size": 0 if gaussian else len(state["quantize.embedding.weight"]),
        "l2_normalize": config.get("use_l2_norm", False),
        "commitment_weight": config.get("commitment_cost", 0.25),
        "bottleneck": "gaussian" if gaussian else "clustering_vq" if config.get("clustering_vq") else "vq",
        "latent_layout": "legacy" if legacy else "per_token",
        "head": "proxy" if legacy else "pixel",
        "decoder_patch_size": config.get("decoder_patch_size", patch),
        "usage_window": 64,
    }
    if legacy:
        options["proxy_codebook_size"] = len(state["decoder.ffn.2.weight"])
    if config.get("pixel_decoder") and "pixel_decoder.conv_in.weight" in state:
        options["pixel_decoder"] = MaskGITDecoder(**_convolutions(config["pixel_decoder"]))
    text = state.get("decoder.text_guidance_positional_embedding")
    if text is not None:
        options |= {"text_length": len(text), "text_dim": state["decoder.text_guidance_proj.weight"].shape[1]}
    return options


def _vit(case: Case, part: str) -> dict[str, int]:
    """Sizes of one transformer; the number of heads does not show in the weights."""
    config, short = case.config, {"encoder": "enc", "decoder": "dec"}[part]
    width = case.state[f"{part}.ln_pre.weight"].numel()
    layers = len({name.split(".")[2] for name in case.state if name.startswith(f"{part}.transformer.")})
    heads = config.get(f"vit_{short}_heads", config.get(f"{part}_heads", config.get("vit_heads", width // 64)))
    return {"width": width, "layers": layers, "heads": heads}


def _convolutions(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "base_channels": config["hidden_channels"],
        "multipliers": config["channel_mult"],
        "num_res_blocks": config["num_res_blocks"],
        "z_channels": config["z_channels"],
    }


def run_titok(case: Case) -> list[Check]:
    model = TiTok(**titok_options(case))
    load_strict(model, to_ours(case.state, model), what=case.name)
    returned = to_published(model.state_dict())
    same = returned.keys() - {"quantize.embed_prob"} == case.state.keys() - {"quantize.embed_prob"}
    checks = [Check("published names", float(not same), same, "other names than the golden state dict")]
    if "proxy_codes" in case.inputs:
        return checks + _stage_one(case, model.train())
    with torch.no_grad():
        return checks + (_gaussian(case, model.eval()) if "mean" in case.outputs else _vq(case, model.eval()))


def _unit(pixels: Tensor) -> Tensor:
    return (pixels + 1.0) / 2.0


def _vq(case: Case, model: TiTok) -> list[Check]:
    pixels, text = case.inputs["image"] * 2.0 - 1.0, case.inputs.get("text")
    quantized = model.quantize(model.latents(pixels))
    losses = quantized.losses
    output = model(pixels, text)
    got = {
        "ln_post": model.encoder.latent_states(case.inputs["image"], model.latent_tokens),
        "encoder_z": model.latents(pixels),
        "indices": model.encode(pixels).unsqueeze(1),
        "z_quantized": quantized.latent,
        "quantizer_loss": losses["vq"] + losses["commit"],
        "commitment_loss": losses["commit"],
        "codebook_loss": losses["vq"],
        "recon": _unit(output.reconstruction),
    }
    if "tokens" in case.inputs:
        tokens = case.inputs["tokens"].flatten(1)
        got["decoded_tokens"] = _unit(model.decode(tokens, text))
        if text is not None:
            got["decoded_tokens_zero_text"] = _unit(model.decode(tokens))
    if model.head == "proxy":
        got["decoder_logits"] = model.decoder(quantized.latent)
        got["pixel_latent"] = model.proxy_vectors(got["decoder_logits"])
    same = torch.equal(output.ids, model.encode(pixels))
    reconstruct = (model.reconstruct(pixels, text) - output.reconstruction).abs().max().item()
    return [
        *check_all(case, got),
        Check("forward ids", float(not same), same, "not encode's"),
        Check("reconstruct", reconstruct, reconstruct < 1e-4, "not forward's"),
    ]


def _gaussian(case: Case, model: TiTok) -> list[Check]:
    pixels = case.inputs["image"] * 2.0 - 1.0
    latent = model.posterior(pixels)
    sample = latent.sample(case.inputs["noise"])
    got = {
        "mean": latent.mean,
        "logvar": latent.logvar,
        "sample": sample,
        "kl": latent.kl(),
        "recon_mean": _unit(model.reconstruct(pixels)),
        "recon_sample": _unit(model.decode_latents(sample)),
    }
    return check_all(case, got)


def _stage_one(case: Case, model: TiTok) -> list[Check]:
    pixels = case.inputs["image"] * 2.0 - 1.0
    prediction = model.predict(pixels)
    entropy = token_cross_entropy(prediction.logits.flatten(2).transpose(1, 2), case.inputs["proxy_codes"].flatten(1))
    quantizer = sum(prediction.losses.values())
    total = entropy + quantizer
    total.backward()
    got = {
        "logits": prediction.logits,
        "indices": prediction.ids.unsqueeze(1),
        "z_quantized": model.quantize(model.latents(pixels)).latent,
        "loss_total_loss": total,
        "loss_reconstruction_loss": entropy,
        "loss_quantizer_loss": quantizer,
        "loss_commitment_loss": prediction.losses["commit"],
        "loss_codebook_loss": prediction.losses["vq"],
    }
    got |= {f"grad.{name}": value.grad for name, value in model.named_parameters() if value.grad is not None}
    return check_all(case, got)


def run_clustering(case: Case) -> list[Check]:
    codes = case.state["embedding.weight"]
    quantizer = ClusteringQuantizer(
        codebook_size=codes.shape[0],
        codebook_dim=codes.shape[1],
        l2_normalize=case.config["use_l2_norm"],
        commitment_weight=case.config["commitment_cost"],
        decay=case.config["decay"],
        usage_window=64,
    ).train()
    load_strict(quantizer, {"codebook_used": quantizer.codebook_used, **case.state}, what=case.name)
    checks = []
    for call in range(sum(name.startswith("z") for name in case.inputs)):
        quantized = quantizer(case.inputs[f"z{call}"])
        got = {
            "z_quantized": quantized.latent,
            "indices": quantized.ids.view(case.outputs[f"indices{call}"].shape),
            "codebook_loss": quantized.losses["vq"],
            "commitment_loss": quantized.losses["commit"],
            "embed_prob": quantizer.embed_prob.clone(),
            "embedding": quantizer.embedding.weight.detach().clone(),
        }
        checks += check_all(case, {f"{name}{call}": value for name, value in got.items()})
    return checks


# MaskGIT-VQGAN


@torch.no_grad()
def run_vqgan(case: Case) -> list[Check]:
    sizes = _convolutions(case.config)
    quantizer = VectorQuantizer(
        codebook_size=len(case.state["quantize.embedding.weight"]),
        codebook_dim=sizes["z_channels"],
        l2_normalize=False,
        commitment_weight=case.config.get("commitment_cost", 0.25),
        usage_window=64,
    )
    usage = {"codebook_used": quantizer.codebook_used}
    load_strict(quantizer, usage | case.part("quantize."), what=case.name)
    got: dict[str, Tensor] = {}
    checks = []
    whole = all(case.part(f"{part}.") for part in ("encoder", "decoder"))
    if case.part("encoder."):
        encoder = _loaded(Encoder(**sizes), case.part("encoder."))
        hidden = encoder(case.inputs["image"])
        quantized = quantizer(hidden)
        got |= {
            "hidden": hidden,
            "indices": quantized.ids,
            "z_q": quantized.latent,
            "loss": quantized.losses["vq"] + quantized.losses["commit"],
        }
    if case.part("decoder.") and "indices" in case.inputs:
        decoder = _loaded(MaskGITDecoder(**sizes), case.part("decoder."))
        codes = quantizer.lookup(case.inputs["indices"]).permute(0, 3, 1, 2)
        image = decoder(codes)
        got |= {"codes": codes, "image": image, "image_clamped": image.clamp(0, 1)}
    if not whole:
        checks.append(_whole_vqgan(case, sizes, got))
    return check_all(case, got) + checks


def _whole_vqgan(case: Case, sizes: dict[str, Any], got: Mapping[str, Tensor]) -> Check:
    """The tokenizer assembled from the parts that the case holds gives the same ids or images."""
    codes = case.state["quantize.embedding.weight"]
    stride = 2 ** (len(sizes["multipliers"]) - 1)
    model = MaskGITVQGAN(image_size=8 * stride, codebook_size=len(codes), usage_window=64, **sizes).eval()
    missing = model.load_state_dict(case.state, strict=False)
    assert not missing.unexpected_keys
    if "image" in case.inputs:
        ok = torch.equal(model.encode(case.inputs["image"] * 2.0 - 1.0), got["indices"])
        return Check("tokenizer ids", float(not ok), ok, "other ids than the parts")
    ids = case.inputs["indices"]
    error = (_unit(model.decode(ids.flatten(1), grid=ids.shape[1:])) - got["image"]).abs().max().item()
    return Check("tokenizer images", error, error < 1e-5, "other images than the parts")


def _loaded(module: nn.Module, state: Mapping[str, Tensor]) -> Any:
    load_strict(module, dict(state), what="golden")
    return module.eval()


# Manifests


def run_manifest(case: Case) -> list[Check]:
    """Build the preset with the manifest's shapes and compare every name, both ways."""
    for options in _candidates(case.manifest):
        with torch.device("meta"):
            model = build(options)
        published = to_published(model.state_dict())
        if {name: tuple(value.shape) for name, value in published.items()} == case.manifest:
            return compare_manifest(case, published, count_parameters(model))
    return [Check("names and shapes", 1.0, False, "no preset of configs/tokenizer has these names and shapes")]


def _candidates(manifest: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    if "latent_tokens" not in manifest:
        return [yaml.safe_load((CONFIGS / "maskgit_vqgan.yaml").read_text())]
    found = []
    for path in sorted(Path(CONFIGS).glob("*titok_*.yaml")):
        options = yaml.safe_load(path.read_text())
        if options["_target_"] != "vgen.tokenizers.titok.TiTok":
            continue
        if options["num_latent_tokens"] != manifest["latent_tokens"][0]:
            continue
        found.append(options)
        if options["head"] == "proxy":
            found.append(options | {"pixel_decoder": None})
        if options["bottleneck"] == "vq":
            found.append(options | {"bottleneck": "clustering_vq"})
    return found
