"""Golden cases of LlamaGen's discriminators, LPIPS and combined tokenizer loss."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from adapters import (
    Case,
    Check,
    Tolerance,
    UnknownCase,
    compare_all,
    compare_manifest,
    count_parameters,
)
from adapters.procedural import default_rule, fill, parse_rule
from torch import Tensor, nn

from vgen.checkpoints.convert import load_strict
from vgen.losses.adversarial import (
    Blur,
    PatchGAN,
    StyleBlock,
    StyleGANDiscriminator,
    hinge_discriminator,
    hinge_generator,
    logistic_discriminator,
    reference_non_saturating_discriminator,
    reference_non_saturating_generator,
)
from vgen.losses.perceptual import LPIPS
from vgen.losses.vq import VQLoss

ACTIVATIONS = Tolerance(2e-5, 1e-4)


def loaded(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The module with these weights, in evaluation mode."""
    load_strict(module, dict(state), what="golden")
    return module.eval()


def patchgan_of(state: Mapping[str, Tensor]) -> PatchGAN:
    """The PatchGAN whose state dict this is."""
    convs = [name for name, value in state.items() if name.endswith(".weight") and value.dim() == 4]
    width, channels = state["main.0.weight"].shape[:2]
    model = PatchGAN(in_channels=channels, base_channels=width, num_layers=len(convs) - 2)
    load_strict(model, dict(state), what="golden")
    return model


def run_patchgan(case: Case) -> list[Check]:
    close = case.tolerance("atol", default=ACTIVATIONS)
    model = patchgan_of(case.state).train()
    fake = case.inputs["fake"].clone().requires_grad_()
    real_logits, fake_logits = model(case.inputs["real"]), model(fake)
    loss = hinge_discriminator(real_logits, fake_logits)
    loss.backward()
    after = {f"after.{name}": value.clone() for name, value in model.named_buffers()}
    got = after | {
        "train_real": real_logits,
        "train_fake": fake_logits,
        "train_hinge_d": loss,
        "train_grad_first_conv": model.main[0].weight.grad,
        "train_grad_fake": fake.grad,
        "eval_real": model.eval()(case.inputs["real"]),
    }
    return compare_all(case, got, close)


def run_stylegan(case: Case) -> list[Check]:
    close = case.tolerance("blocks", default=ACTIVATIONS)
    got: dict[str, Tensor] = {}
    for name in {key.split(".")[0] for key in case.state}:
        state = case.part(f"{name}.")
        cout, cin = state["conv_res.weight"].shape[:2]
        block = StyleBlock(cin, cout, downsample="downsample.1.weight" in state)
        got[name] = loaded(block, state)(case.inputs["x"])
    if "blur" in case.outputs:
        got["blur"] = Blur()(case.inputs["x"])
    checks = compare_all(case, got, close)
    if "full" in case.outputs:
        checks += compare_all(case, _stylegan_full(case), case.tolerance("full", default=Tolerance(None, 1e-3)))
    return checks


def _stylegan_full(case: Case) -> dict[str, Tensor]:
    side, seed = case.config["image_size"], case.data["seed"]
    gain, _ = parse_rule(case.data.get("weights_full", ""))
    with torch.device("meta"):
        model = StyleGANDiscriminator(image_size=side)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state = {
        name: torch.tensor([1.0, 2.0, 1.0])
        if name.endswith(".f")
        else default_rule(f"stylegan.{name}", shape, seed, gain=gain)
        for name, shape in shapes.items()
    }
    want = {name: tuple(shape) for name, shape in case.data["full_state_dict_shapes"].items()}
    assert shapes == want, "our StyleGAN discriminator has other names or shapes"
    model.load_state_dict(state, assign=True)
    x = fill("stylegan.x", (case.config["batch"], 3, side, side), seed, -1, 1).requires_grad_()
    logits = model(x)
    logits.sum().backward()
    crop = case.outputs["full_grad_x_crop"].shape[-1]
    return {
        "full": logits,
        "full_grad_x_sum": x.grad.abs().sum(),
        "full_grad_x_crop": x.grad[:, :, :crop, :crop],
    }


def procedural_lpips(seed: int) -> LPIPS:
    """LPIPS with the weights of the golden cases."""
    model = LPIPS()
    state = {}
    for name, value in model.state_dict().items():
        shape = tuple(value.shape)
        if name.startswith("lin"):
            value = fill(f"lpips.{name}", shape, seed, 0, 0.2)
        elif name.startswith("net."):
            value = default_rule(f"lpips.{name}", shape, seed, gain=math.sqrt(2))
        state[name] = value
    load_strict(model, state, what="lpips")
    return model


def run_lpips(case: Case) -> list[Check]:
    model = procedural_lpips(case.data["seed"])
    want = {name: tuple(shape) for name, shape in case.data["lpips_state_dict_shapes"].items()}
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    checks = [Check("names and shapes", float(want != ours), want == ours, "other LPIPS names or shapes")]
    a, b = case.inputs["a"], case.inputs["b"].clone().requires_grad_()
    value = model(a, b)
    value.mean().backward()
    got = {"value": value.view(-1, 1, 1, 1), "grad_b_abs_sum": b.grad.abs().sum()}
    if "grad_b_crop" in case.outputs:
        rows, columns = case.outputs["grad_b_crop"].shape[2:]
        got["grad_b_crop"] = b.grad[:, :, :rows, :columns]
    for index, (feature, layer) in enumerate(zip(model.features(a), model.layers(a, b), strict=True)):
        got[f"layer{index}"] = layer.view(-1, 1, 1, 1)
        got[f"feat{index}_stats"] = torch.stack([feature.mean(), feature.std()])
        if f"feat{index}_crop" in case.outputs:
            _, channels, rows, columns = case.outputs[f"feat{index}_crop"].shape
            got[f"feat{index}_crop"] = feature[:, :channels, :rows, :columns]
    return checks + compare_all(case, got, case.tolerance("lpips", default=Tolerance(None, 1e-3)))


def run_vq_loss(case: Case) -> list[Check]:
    real, fake = case.inputs["logits_real"], case.inputs["logits_fake"]
    functions = {
        "hinge_d": hinge_discriminator(real, fake),
        "vanilla_d": logistic_discriminator(real, fake),
        "nonsat_d": reference_non_saturating_discriminator(real, fake),
        "hinge_g": hinge_generator(fake),
        "nonsat_g": reference_non_saturating_generator(fake),
    }
    checks = compare_all(case, functions, case.tolerance("adversarial", default=Tolerance(None, 1e-5)))
    recon = F.conv2d(case.inputs["feat"], case.inputs["w_last"], padding=1)
    checks += compare_all(case, {"recon": recon}, ACTIVATIONS)
    perceptual = procedural_lpips(case.data["seed"])
    close = case.tolerance("LPIPS", default=Tolerance(None, 1e-3))
    for variant in case.config["variants"]:
        got = _vq_loss_variant(case, variant, perceptual)
        checks += compare_all(case, {f"{variant['tag']}.{name}": value for name, value in got.items()}, close)
    return checks


def vq_loss_options(config: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments for those of the original's VQLoss, without LPIPS."""
    names = {
        "reconstruction_loss": "reconstruction",
        "reconstruction_weight": "reconstruction_weight",
        "perceptual_weight": "perceptual_weight",
        "disc_loss": "discriminator_loss",
        "gen_adv_loss": "generator_loss",
        "disc_weight": "adversarial_weight",
        "disc_start": "adversarial_start",
        "disc_adaptive_weight": "adaptive",
    }
    # The loss module itself defaults to a weight of 1; the training script passes 0.5.
    given = {"disc_start": config["disc_start"], "disc_weight": 1.0, **kwargs}
    unknown = set(given) - set(names)
    if unknown:
        raise UnknownCase(f"VQLoss arguments {', '.join(sorted(unknown))}")
    options = {names[key]: value for key, value in given.items()}
    for key in ("discriminator_loss", "generator_loss"):
        if options.get(key) == "non-saturating":
            options[key] = "non-saturating-reference"
    return options | {"perceptual": "none"}


def _vq_loss_variant(case: Case, variant: Mapping[str, Any], perceptual: LPIPS) -> dict[str, Tensor]:
    loss = VQLoss(**vq_loss_options(case.config, variant["kwargs"]))
    loss.perceptual = perceptual
    x, step = case.inputs["x"], variant["global_step"]
    discriminator = patchgan_of(case.part("discriminator.")).train()
    last = case.inputs["w_last"].clone().requires_grad_()
    recon = F.conv2d(case.inputs["feat"], last, padding=1)
    quantizer = dict(zip(("vq", "commit", "entropy"), case.inputs["codebook_losses"], strict=True))
    total, logs = loss.generator_loss(x, recon, quantizer, step=step, discriminator=discriminator, last_layer=last)
    (grad,) = torch.autograd.grad(total, last)
    discriminator = patchgan_of(case.part("discriminator.")).train()
    disc_total, _ = loss.discriminator_loss(x, recon, step=step, discriminator=discriminator)
    disc_total.backward()
    got = {
        "gen_total": total,
        "grad_last": grad,
        "rec": logs["reconstruction"],
        "lpips": logs["perceptual"],
        "disc_total": disc_total,
        "disc_grad_first": discriminator.main[0].weight.grad,
    }
    # Before its start our adversarial term is not even computed; the original computes it and multiplies by 0.
    discriminator = patchgan_of(case.part("discriminator.")).train()
    got["gen_adv"] = logs.get("generator", loss.generator_objective(discriminator(recon)))
    if not loss.adaptive:
        got["adaptive_weight"] = torch.ones(())
    elif "adaptive_weight" in logs:
        got["adaptive_weight"] = logs["adaptive_weight"]
    return got


def run_patchgan_manifest(case: Case) -> list[Check]:
    config = case.data["__file__"]["config"]
    with torch.device("meta"):
        model = PatchGAN(in_channels=config["input_nc"], base_channels=config["ndf"], num_layers=config["n_layers"])
    return compare_manifest(case, model.state_dict(), count_parameters(model))


def run_stylegan_manifest(case: Case) -> list[Check]:
    with torch.device("meta"):
        model = StyleGANDiscriminator(image_size=case.data["__file__"]["config"]["image_size"])
    return compare_manifest(case, model.state_dict(), count_parameters(model))


def run_lpips_manifest(case: Case) -> list[Check]:
    with torch.device("meta"):
        model = LPIPS()
    return compare_manifest(case, model.state_dict(), count_parameters(model))
