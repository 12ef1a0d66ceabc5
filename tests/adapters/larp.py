"""Golden cases of LARP: tokenizer, quantizer, positions, discriminator, Frechet statistics, preprocessing."""

import re

import torch
from adapters import Case, Check, Tolerance, UnknownCase, compare, compare_manifest, count_parameters
from adapters.larp_ar import is_generator, run_generator
from torch import Tensor

from vgen.checkpoints.convert import load_strict
from vgen.checkpoints.larp import to_ours, to_published, tokenizer_arguments
from vgen.data.video_transforms import ClipTransform, first_frames, pad_frames
from vgen.evaluation.frechet import frechet_distance, gaussian_of
from vgen.layers.sincos import sincos_1d, sincos_3d
from vgen.losses.adversarial import hinge_discriminator, hinge_generator, non_saturating_generator
from vgen.losses.larp import ClipDiscriminator, lecam, smoothed_logistic_discriminator
from vgen.tokenizers.larp import LARP
from vgen.tokenizers.larp_quantizer import StochasticQuantizer

EXACT_IDS = Tolerance(0.0, 0.0)


def run(case: Case) -> list[Check]:
    """Find out what a case is from its content and run it."""
    if is_generator(case):
        return run_generator(case)
    if case.is_manifest:
        return run_manifest(case)
    if "clip" in case.inputs and "bottleneck" in case.config:
        return run_tokenizer(case)
    if "z" in case.inputs:
        return run_quantizer(case)
    if {"real", "fake"} <= case.inputs.keys():
        return run_discriminator(case)
    if "frames" in case.inputs:
        return run_preprocessing(case)
    if "features_gen" in case.inputs:
        return run_statistics(case)
    if any(name.startswith("sincos") for name in case.outputs):
        return run_positions(case)
    raise UnknownCase("neither a manifest, tokenizer, quantizer, discriminator, positions, features nor frames of LARP")


def run_manifest(case: Case) -> list[Check]:
    with torch.device("meta"):
        tokenizer = LARP(**tokenizer_arguments(case.data["__config__"]))
    parameters = count_parameters(tokenizer)
    checks = compare_manifest(case, to_published(tokenizer.state_dict()), parameters)
    stated = case.data["__params__"]
    return [*checks, Check("parameters", abs(parameters - stated), parameters == stated, f"{parameters}, not {stated}")]


# Tokenizer


def build_tokenizer(case: Case) -> LARP:
    """The tokenizer of a case; priors other than the published one have their sizes in the state dict and a remark."""
    sizes = None
    if "prior_model.pos_emb" in case.state:
        heads = re.search(r"n_head=(\d+)", str(case.data.get("tiny_prior")))
        blocks = {name.split(".")[2] for name in case.state if name.startswith("prior_model.blocks.")}
        if heads is not None:
            dim = case.state["prior_model.pos_emb"].shape[-1]
            sizes = {"dim": dim, "depth": len(blocks), "heads": int(heads.group(1))}
    tokenizer = LARP(**tokenizer_arguments(case.config, prior_sizes=sizes)).eval()
    load_strict(tokenizer, to_ours(case.state, tokenizer), what=case.name)
    return tokenizer


@torch.no_grad()
def run_tokenizer(case: Case) -> list[Check]:
    stated = case.data.get("tolerance", {})
    tolerance = Tolerance(stated.get("float_atol", 3e-4), stated.get("float_rtol", 1e-4))
    tokenizer, pixels = build_tokenizer(case), case.inputs["clip"] * 2 - 1
    quantizer, frames = tokenizer.bottleneck.regularizer, pixels.shape[2]
    latents = tokenizer.latents(pixels)
    codes, ids, losses = quantizer.sequence(latents)
    rows = quantizer.rows(latents.transpose(1, 2).unsqueeze(3))
    reconstruction = tokenizer.decode_latents(codes, frames)
    weight = quantizer.commitment_weight
    got = {
        "patch_tokens": tokenizer.patch_tokens(pixels),
        "encoder_out": tokenizer.features(pixels),
        "projected_z": latents,
        "unregularized_z": rows.view_as(latents),
        "regularized_z": codes,
        "encoded": tokenizer.bottleneck.out_linear(codes),
        "decoder_out": tokenizer.decoded_patches(codes, frames),
        "recon": (reconstruction + 1) / 2,
        "recon_from_indices": (tokenizer.decode(tokenizer.encode(pixels)) + 1) / 2,
        "loss_q": sum(losses.values(), torch.zeros(())),
        "loss_commit": losses["commit"] / (weight or 1.0),
        "loss_codebook": losses["vq"],
        "loss_entropy": losses["entropy"] / (quantizer.entropy_weight or 1.0),
    }
    tokens = {"indices": ids, "encode": tokenizer.encode(pixels)}
    if "short_recon" in case.outputs:
        short = case.outputs["short_recon"].shape[2]
        tokens["short_indices"] = tokenizer.encode(pixels[:, :, :short])
        got["short_recon"] = (tokenizer.decode(tokens["short_indices"], frames=short) + 1) / 2
    if "probs" in case.outputs:
        got["probs"] = quantizer.probabilities(rows, quantizer.codebook)
    if tokenizer.prior_model is not None:
        got |= judge(tokenizer, codes, ids)
    checks = [case.compare(name, value, tolerance) for name, value in got.items() if name in case.outputs]
    checks += [case.compare(name, value, EXACT_IDS) for name, value in tokens.items() if name in case.outputs]
    return [*checks, compare("encode", tokens["encode"], case.outputs["indices"], EXACT_IDS)]


def judge(tokenizer: LARP, codes: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """What the prior says at the first step of training, when no input is replaced yet."""
    assert tokenizer.prior_model is not None
    prior = tokenizer.prior_model(codes, ids, tokenizer.bottleneck.regularizer.unit_codebook(), progress=0.0)
    best = prior.logits[-1].topk(5, dim=-1).indices == ids[:, 1:, None]
    return {
        "prior_logits_rounds": torch.stack(prior.logits),
        "prior_pred": prior.prediction,
        "loss_latent_ce": prior.loss,
        "prior_top1_acc": 100 * best[..., 0].float().mean(),
        "prior_top5_acc": 100 * best.any(-1).float().mean(),
    }


# Quantizer

VARIANTS = {
    "svq_l2": {"l2_normalize": True, "temperature": 0.03},
    "l2_argmin": {"l2_normalize": True, "temperature": 0.0},
    "plain_argmin": {"l2_normalize": False, "temperature": 0.0},
    "plain_entropy": {"l2_normalize": False, "temperature": 0.0},
}


def run_quantizer(case: Case) -> list[Check]:
    stated = case.data.get("tolerance", {})
    tolerance = Tolerance(stated.get("atol", 1e-5), stated.get("rtol", 1e-4))
    names = {name.split(".")[0] for name in case.outputs}
    if not names <= VARIANTS.keys():
        raise UnknownCase(f"quantizer variants {', '.join(sorted(names - VARIANTS.keys()))}")
    checks = []
    for variant in sorted(names):
        options = VARIANTS[variant] | stated_entropy(case, variant)
        got = quantize(case, options)
        for name, value in got.items():
            key = f"{variant}.{name}"
            if key in case.outputs:
                checks.append(case.compare(key, value, EXACT_IDS if value.dtype == torch.int64 else tolerance))
    return checks


def stated_entropy(case: Case, variant: str) -> dict[str, float]:
    """Weight and temperature of the entropy loss, from a remark such as "x: entropy weight 0.1 temperature 0.01"."""
    remark = re.search(rf"{variant}: entropy weight ([\d.e-]+) temperature ([\d.e-]+)", case.config["variants"])
    if remark is None:
        return {}
    return {"entropy_weight": float(remark[1]), "entropy_temperature": float(remark[2])}


def quantize(case: Case, options: dict) -> dict[str, Tensor]:
    weight = case.state["embedding.weight"]
    quantizer = StochasticQuantizer(codebook_size=len(weight), codebook_dim=weight.shape[1], usage_window=1, **options)
    quantizer.eval().embedding.weight.data.copy_(weight)
    latents = case.inputs["z"].clone().requires_grad_()
    codes, ids, losses = quantizer.sequence(latents)
    total = sum(losses.values(), torch.zeros(()))
    (total + (codes * torch.linspace(-1, 1, codes.shape[-1])).sum()).backward()
    rows = quantizer.rows(latents.transpose(1, 2).unsqueeze(3))
    entropies = torch.zeros(2)
    if quantizer.entropy_weight:
        entropies = torch.stack(quantizer.entropies(quantizer.distances(rows, quantizer.codebook)))
    assert latents.grad is not None
    assert quantizer.embedding.weight.grad is not None
    return {
        "bottleneck_rep": ids,
        "unregularized_z": rows.view_as(latents),
        "regularized_z": codes,
        "loss_q": total,
        "loss_commit": losses["commit"] / quantizer.commitment_weight,
        "loss_codebook": losses["vq"],
        "loss_entropy": losses["entropy"] / (quantizer.entropy_weight or 1.0),
        "per_sample_entropy": entropies[0],
        "codebook_entropy": entropies[1],
        "grad_z": latents.grad,
        "grad_emb": quantizer.embedding.weight.grad,
        "decode": quantizer.lookup(ids),
    }


# The rest


def run_positions(case: Case) -> list[Check]:
    stated = case.data.get("tolerance", {})
    tolerance = Tolerance(stated.get("atol", 1e-6), stated.get("rtol", 0.0))
    checks = []
    for name in case.outputs:
        if line := re.fullmatch(r"sincos1d_(\d+)_(\d+)(?:_base(\d+))?", name):
            dim, count, base = int(line[1]), int(line[2]), float(line[3] or 10000)
            table = sincos_1d(dim, torch.arange(count), base=base).float()
        elif block := re.fullmatch(r"sincos3d_(\d+)_g(\d+)_t(\d+)", name):
            side = int(block[2])
            table = sincos_3d(int(block[1]), (int(block[3]), side, side))
        else:
            raise UnknownCase(f"a table named {name}")
        checks.append(case.compare(name, table, tolerance))
    return checks


@torch.no_grad()
def run_discriminator(case: Case) -> list[Check]:
    stated, config = case.data.get("tolerance", {}), case.config
    tolerance = Tolerance(stated.get("atol", 2e-4), stated.get("rtol", 1e-4))
    if config["in_channels"] != 3:
        raise UnknownCase(f"a discriminator of {config['in_channels']} channels")
    discriminator = ClipDiscriminator(
        image_size=config["input_size"],
        num_frames=config["frame_num"],
        patch=(config["temporal_patch_size"], config["patch_size"], config["patch_size"]),
        dim=config["hidden_size"],
        depth=config["n_layers"],
        heads=config["n_heads"],
    ).eval()
    load_strict(discriminator, to_ours(case.state, discriminator), what=case.name)
    # The original takes whatever values it is given; ours takes -1..1 and shifts them to the original's range.
    real, fake = (discriminator(case.inputs[name] * 2 - 1) for name in ("real", "fake"))
    got = {
        "logits_real": real,
        "logits_fake": fake,
        "ns_d": smoothed_logistic_discriminator(real, fake, 0.0),
        "ns_g": non_saturating_generator(fake),
        "hinge_d": hinge_discriminator(real, fake),
        "hinge_g": hinge_generator(fake),
        "lecam": lecam(real, fake, torch.stack([case.inputs["ema_real"], case.inputs["ema_fake"]])),
    }
    return [case.compare(name, value, tolerance) for name, value in got.items() if name in case.outputs]


def run_preprocessing(case: Case) -> list[Check]:
    stated, config = case.data.get("tolerance", {}), case.config
    tolerance = Tolerance(stated.get("atol", 1e-5), stated.get("rtol", 0.0))
    clip = ClipTransform(image_size=config["crop_size"], crop="center", flip=True)(case.inputs["frames"])
    padded = pad_frames(clip, config["frame_num"])
    got = {
        "clip": clip,
        "padded": padded,
        "cond_clip": first_frames(padded[None], config["num_cond_frames"]),
    }
    return [case.compare(name, value, tolerance) for name, value in got.items() if name in case.outputs]


def run_statistics(case: Case) -> list[Check]:
    tolerance = Tolerance(rtol=case.data.get("tolerance", {}).get("rtol", 1e-6))
    generated, real = (gaussian_of(case.inputs[f"features_{name}"], ddof=0) for name in ("gen", "real"))
    got = {
        "f64_mean_gen": generated.mean,
        "f64_cov_gen": generated.covariance,
        "f64_mean_real": real.mean,
        "f64_cov_real": real.covariance,
        "f64_fvd": torch.tensor(frechet_distance(generated, real), dtype=torch.float64),
    }
    return [case.compare(name, value, tolerance) for name, value in got.items() if name in case.outputs]
