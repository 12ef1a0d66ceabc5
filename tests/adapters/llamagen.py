"""Golden cases of LlamaGen's tokenizer, losses and image pipeline; GPT cases go to llamagen_gpt.py."""

import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from adapters import (
    EXACT,
    Case,
    Check,
    Tolerance,
    UnknownCase,
    compare,
    compare_all,
    compare_manifest,
    count_parameters,
)
from adapters.llamagen_losses import (
    ACTIVATIONS,
    loaded,
    run_lpips,
    run_lpips_manifest,
    run_patchgan,
    run_patchgan_manifest,
    run_stylegan,
    run_stylegan_manifest,
    run_vq_loss,
)
from adapters.procedural import default_rule, parse_rule
from torch import Tensor, nn

from vgen.checkpoints.convert import load_strict
from vgen.checkpoints.llamagen_vq import to_ours, to_published
from vgen.pixels import resize_pixels, to_uint8
from vgen.tokenizers.convnet import AttnBlock, Downsample, ResBlock, Upsample
from vgen.tokenizers.norm_swish import group_norm
from vgen.tokenizers.quantize import VectorQuantizer
from vgen.tokenizers.vqgan import VQGAN

PRESETS = {"VQ-16": "vq16", "VQ-8": "vq8"}
CONFIGS = Path(__file__).parents[2] / "configs" / "tokenizer"
GRADIENTS = Tolerance(1e-5, 1e-3)
FULL_SIZE = Tolerance(5e-4, 1e-3)
SCALARS = Tolerance(1e-6, 1e-4)


def run(case: Case) -> list[Check]:
    """Find out what a case is from its content and run it."""
    for known, runner in RUNNERS:
        if known(case):
            return runner(case)
    try:
        from adapters.llamagen_gpt import run_gpt
    except ModuleNotFoundError as error:
        raise UnknownCase("neither a tokenizer, loss or image case, and adapters.llamagen_gpt is missing") from error
    results = run_gpt(case)
    if not isinstance(results, Mapping):
        return list(results)
    return [value if isinstance(value, Check) else _compare_gpt(case, name, value) for name, value in results.items()]


def _compare_gpt(case: Case, name: str, value: Tensor) -> Check:
    name = name.removeprefix("out.")
    if not case.outputs[name].is_floating_point():
        return case.compare(name, value, EXACT)
    topics = ("grad",) if name.startswith("grad") else ("logits", "probs")
    return case.compare(name, value, case.tolerance(*topics, default=Tolerance(2e-4, 1e-4)))


# Tokenizer


def tokenizer_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments for a preset's name or for the original's configuration."""
    if "model" in config:
        options = yaml.safe_load((CONFIGS / f"{PRESETS[config['model']]}.yaml").read_text())
        assert options.pop("_target_") == "vgen.tokenizers.vqgan.VQGAN"
        return options
    names = {
        "ch": "base_channels",
        "num_res_blocks": "num_res_blocks",
        "z_channels": "z_channels",
        "codebook_size": "codebook_size",
        "codebook_embed_dim": "codebook_dim",
        "codebook_l2_norm": "l2_normalize",
        "commit_loss_beta": "commitment_weight",
        "entropy_loss_ratio": "entropy_weight",
        "dropout_p": "dropout",
    }
    common = config.get("ch_mult")
    encoder = config.get("encoder_ch_mult", common)
    options = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    return options | {
        "encoder_multipliers": encoder,
        "decoder_multipliers": config.get("decoder_ch_mult", common),
        "image_size": 2 ** (len(encoder) + 3),
    }


def run_tokenizer(case: Case) -> list[Check]:
    model = VQGAN(**tokenizer_options(case.config))
    procedural = not case.state
    shapes = {name: tuple(value.shape) for name, value in to_published(model.state_dict()).items()}
    state = _procedural_state(case, shapes) if procedural else case.state
    load_strict(model, to_ours(state, model), what=case.name)
    checks = _tokenizer_forward(case, model.eval(), FULL_SIZE if procedural else ACTIVATIONS)
    if any(name.startswith(("train_", "grad.", "codebook_used")) for name in case.outputs):
        checks += _tokenizer_training(case, model.train())
    for name in case.outputs:
        if name.startswith("check."):
            want = case.outputs[name]
            checks.append(case.compare(name, state[name[6:]].flatten()[: want.numel()], Tolerance(1e-7, 0.0)))
    return checks


def _procedural_state(case: Case, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    gain, overrides = parse_rule(case.data["weights"])
    seed = case.data["seed"]
    return {name: default_rule(name, shape, seed, gain=gain, overrides=overrides) for name, shape in shapes.items()}


@torch.no_grad()
def _tokenizer_forward(case: Case, model: VQGAN, default: Tolerance) -> list[Check]:
    close = case.tolerance("activations", "prequant", default=default)
    pixels = case.inputs["x"]
    quantizer = model.quantize
    latents = model.latents(pixels)
    features = model.encoder(pixels)
    distances = quantizer.distances(quantizer.rows(latents), model.codebook)
    nearest = distances.topk(2, largest=False).values
    quantized = quantizer(latents)
    ids = model.encode(pixels)
    shape = latents.shape[2:]
    got = {
        "enc_h": features,
        "prequant": latents,
        "quant": quantized.latent,
        "index_margin": nearest[:, 1] - nearest[:, 0],
        "recon": model(pixels).reconstruction,
    }
    if "enc_h_crop" in case.outputs:
        got["enc_h_crop"] = features[:, : case.outputs["enc_h_crop"].shape[1]]
    if "indices" in case.outputs:
        want = case.outputs["indices"].view(ids.shape)
        entry = quantizer.lookup(want).transpose(1, 2).unflatten(2, shape)
        got |= {
            "codebook_entry": entry,
            "post_quant": model.post_quant_conv(entry),
            "decode_code": model.decode(want, grid=shape),
        }
    if "code" in case.inputs:
        got["decode_fixed"] = model.decode(case.inputs["code"].view(len(pixels), -1), grid=shape)
    checks = compare_all(case, got, close)
    if "indices" in case.outputs:
        checks += [_compare_ids(case, ids), Check("forward ids", 0.0, torch.equal(quantized.ids, ids), "not encode's")]
    return checks


def _compare_ids(case: Case, ids: Tensor) -> Check:
    """Exact wherever the two best codes are further apart than the case's rounding threshold."""
    got, want = ids.flatten(), case.outputs["indices"]
    stated = re.search(r"index_margin > ([0-9.e-]+)", str(case.data.get("tolerance", "")))
    margin = case.outputs.get("index_margin")
    if margin is not None and got.shape == want.shape:
        clear = margin > (float(stated[1]) if stated else 1e-6)
        got, want = got[clear], want[clear]
    return compare("indices", got, want, EXACT)


def _tokenizer_training(case: Case, model: VQGAN) -> list[Check]:
    gradients = case.tolerance("gradients", default=GRADIENTS)
    pixels = case.inputs["x"]
    output = model(pixels)
    total = F.mse_loss(output.reconstruction, pixels) + sum(output.losses.values())
    total.backward()
    got = {
        "train_vq_loss": output.losses["vq"],
        "train_commit_loss": output.losses["commit"],
        "train_entropy_loss": output.losses["entropy"],
        "train_codebook_usage": model.quantize.usage(),
        "train_total": total,
    }
    checks = compare_all(case, got, SCALARS)
    if "codebook_used_tail" in case.outputs:
        tail = model.quantize.codebook_used[-case.outputs["codebook_used_tail"].numel() :]
        checks.append(case.compare("codebook_used_tail", tail, EXACT))
    grads = {f"grad.{name}": value.grad for name, value in model.named_parameters() if value.grad is not None}
    return checks + compare_all(case, grads, gradients)


def run_blocks(case: Case) -> list[Check]:
    close = case.tolerance("blocks", default=ACTIVATIONS)
    x = case.inputs["x"]
    width = x.shape[1]
    norm = loaded(group_norm(width, 32), case.part("norm.")) if case.part("norm.") else None
    builders: dict[str, Callable[[int], nn.Module]] = {
        "attn": lambda _: AttnBlock(width),
        "down": lambda _: Downsample(width),
        "up": lambda _: Upsample(width),
    }
    checks = []
    for name in case.outputs:
        if name in ("norm", "norm_swish"):
            assert norm is not None
            normed = norm(x)
            checks.append(case.compare(name, normed if name == "norm" else F.silu(normed), close))
            continue
        state = case.part(f"{name}.")
        if name.startswith("res"):
            block: nn.Module = ResBlock(width, state["conv1.weight"].shape[0])
        else:
            block = builders[name.split("_")[0]](width)
        checks.append(case.compare(name, loaded(block, state)(x), close))
    return checks


def run_quantizer(case: Case) -> list[Check]:
    """Variants are named by their tag, l2<0|1>_ent<ratio>."""
    tags = sorted({name.rsplit(".", 1)[0] for name in case.outputs})
    return [check for tag in tags for check in _quantizer_variant(case, tag)]


def _quantizer_variant(case: Case, tag: str) -> list[Check]:
    options = re.fullmatch(r"l2(?P<l2>[01])_ent(?P<entropy>[0-9.]+)", tag)
    if options is None:
        raise UnknownCase(f"quantizer variant {tag} is not named l2<0|1>_ent<ratio>")
    codes = case.state["embedding.weight"]
    quantizer = VectorQuantizer(
        codebook_size=codes.shape[0],
        codebook_dim=codes.shape[1],
        l2_normalize=options["l2"] == "1",
        entropy_weight=float(options["entropy"]),
        commitment_weight=case.config.get("beta", 0.25),
    )
    load_strict(quantizer, {**quantizer.state_dict(), "embedding.weight": codes}, what=case.name)
    z = case.inputs["z"].clone().requires_grad_()
    out = quantizer.train()(z)
    probe = torch.linspace(-1, 1, z.numel()).view(z.shape)
    ((out.latent * probe).sum() + sum(out.losses.values())).backward()
    usage = quantizer.usage()
    quantizer(case.inputs["z"].flip(0) * 0.9 + 0.1)
    values = compare_all(
        case,
        {
            f"{tag}.vq_loss": out.losses["vq"],
            f"{tag}.commit_loss": out.losses["commit"],
            f"{tag}.entropy_loss": out.losses["entropy"],
            f"{tag}.usage": usage,
            f"{tag}.usage_after_2": quantizer.usage(),
        },
        case.tolerance("losses", default=SCALARS),
    )
    gradients = {f"{tag}.grad_z": z.grad, f"{tag}.grad_embedding": quantizer.embedding.weight.grad}
    exact = {f"{tag}.indices": out.ids.flatten()}
    if f"{tag}.queue_tail" in case.outputs:
        exact[f"{tag}.queue_tail"] = quantizer.codebook_used[-case.outputs[f"{tag}.queue_tail"].numel() :]
    return [
        *values,
        *compare_all(case, gradients, case.tolerance("gradients", default=GRADIENTS)),
        *compare_all(case, exact, EXACT),
        *compare_all(case, {f"{tag}.zq": out.latent}, ACTIVATIONS),
    ]


# Images


def run_images(case: Case) -> list[Check]:
    from PIL import Image

    from vgen.data.transforms import adm_center_crop, adm_random_crop, ten_crop, to_pixels

    image = Image.fromarray(case.inputs["image"].to(torch.uint8).numpy())
    size = case.config["size"]
    crop_size = case.config.get("crop_size", int(size * case.config.get("crop_range", 1.1)))
    big = adm_center_crop(image, crop_size)
    crops = ten_crop(big, size)
    got = {
        "center_crop": _array(adm_center_crop(image, size)),
        "center_crop_big": _array(big),
        "ten_crop": torch.stack([_array(crop) for crop in crops]),
        "random_crop": _array(adm_random_crop(image, size, rng=random.Random(case.data["seed"]))),
    }
    checks = compare_all(case, got, Tolerance(0.0 if _same_pillow(case) else 1.0, 0.0))
    floats = {"first_crop_tensor": to_pixels(crops[0])}
    if "resized" in case.outputs:
        side = case.outputs["resized"].shape[-2:]
        resized = resize_pixels(case.inputs["samples"], side[0])
        floats["resized"] = resized
        checks += compare_all(case, {"uint8": to_uint8(resized).permute(0, 2, 3, 1)}, EXACT)
    return checks + compare_all(case, floats, case.tolerance("resized", default=Tolerance(1e-5)))


def _array(image: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image))


def _same_pillow(case: Case) -> bool:
    import PIL

    return case.config.get("pillow") == PIL.__version__


# Manifests


def run_tokenizer_manifest(case: Case) -> list[Check]:
    config = case.data["__file__"]["config"]
    options = tokenizer_options(config)
    for preset in PRESETS:
        shipped = tokenizer_options({"model": preset})
        if all(shipped[key] == value for key, value in options.items() if key != "image_size"):
            options = shipped
    with torch.device("meta"):
        model = VQGAN(**options)
    return compare_manifest(case, to_published(model.state_dict()), count_parameters(model))


RUNNERS: list[tuple[Callable[[Case], bool], Callable[[Case], list[Check]]]] = [
    (lambda c: c.is_manifest and "quantize.embedding.weight" in c.data, run_tokenizer_manifest),
    (lambda c: c.is_manifest and "main.0.weight" in c.data, run_patchgan_manifest),
    (lambda c: c.is_manifest and "final_linear.0.weight" in c.data, run_stylegan_manifest),
    (lambda c: c.is_manifest and "net.slice1.0.weight" in c.data, run_lpips_manifest),
    (lambda c: "quantize.embedding.weight" in c.state or c.config.get("model") in PRESETS, run_tokenizer),
    (lambda c: "lpips_state_dict_shapes" in c.data, run_lpips),
    (lambda c: "w_last" in c.inputs, run_vq_loss),
    (lambda c: "main.0.weight" in c.state, run_patchgan),
    (lambda c: any(".conv_res." in name for name in c.state) or "full_state_dict_shapes" in c.data, run_stylegan),
    (lambda c: set(c.state) == {"embedding.weight"} and "z" in c.inputs, run_quantizer),
    (lambda c: "x" in c.inputs and not c.is_manifest and bool(c.state) and "cin" in c.config, run_blocks),
    (lambda c: "image" in c.inputs and "size" in c.config, run_images),
]
