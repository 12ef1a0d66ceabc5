"""Golden cases of TiTok's second-stage and single-stage losses and their discriminator."""

from collections.abc import Mapping
from typing import Any

import torch
from adapters import Case, Check, Tolerance, compare, compare_manifest, count_parameters
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from vgen.checkpoints.convert import load_strict
from vgen.checkpoints.titok import load_titok_discriminator
from vgen.losses.blur_discriminator import BlurDiscriminator
from vgen.losses.classifier_distance import ClassifierDistance
from vgen.losses.perceptual import LPIPS
from vgen.losses.vq import VQLoss
from vgen.tokenizers.bottleneck import GaussianBottleneck


def run_discriminator_manifest(case: Case) -> list[Check]:
    stages = len({name.split(".")[1] for name in case.manifest if name.startswith("blocks.")})
    with torch.device("meta"):
        model = BlurDiscriminator(base_channels=case.manifest["block_in.0.weight"][0], num_stages=stages)
    return compare_manifest(case, model.state_dict(), count_parameters(model))


def convnext_of(state: Mapping[str, Tensor]) -> ConvNeXt:
    """The ConvNeXt whose state dict this is."""
    settings = []
    for stage in range(1, 8, 2):
        blocks = {name.split(".")[2] for name in state if name.startswith(f"features.{stage}.")}
        width = state[f"features.{stage}.0.layer_scale"].shape[0]
        after = state.get(f"features.{stage + 1}.1.weight")
        settings.append(CNBlockConfig(width, None if after is None else after.shape[0], len(blocks)))
    network = ConvNeXt(settings, num_classes=len(state["classifier.2.weight"]))
    network.load_state_dict(dict(state))
    return network


def perceptual_of(case: Case) -> tuple[ClassifierDistance | None, LPIPS | None]:
    """The two perceptual networks, as far as the case has them."""
    convnext = lpips = None
    if case.part("perceptual_loss.convnext."):
        convnext = ClassifierDistance(convnext_of(case.part("perceptual_loss.convnext.")))
        for ours, theirs in (("mean", "imagenet_mean"), ("std", "imagenet_std")):
            assert torch.allclose(getattr(convnext, ours), case.state[f"perceptual_loss.{theirs}"])
    if case.part("perceptual_loss.lpips."):
        state = case.part("perceptual_loss.lpips.")
        lpips = LPIPS([state[f"lin{index}.model.1.weight"].shape[1] for index in range(5)])
        load_strict(lpips, state, what="lpips")
    return convnext, lpips


def loss_of(case: Case) -> VQLoss:
    """Our loss for the original's configuration, with the case's perceptual networks."""
    config = case.config["losses"]
    loss = VQLoss(
        reconstruction=config["reconstruction_loss"],
        reconstruction_weight=config["reconstruction_weight"],
        reconstruction_range="unit",
        perceptual="none",
        perceptual_weight=config["perceptual_weight"],
        adversarial_weight=config["discriminator_factor"] * config["discriminator_weight"],
        discriminator_weight=config["discriminator_factor"],
        adversarial_start=config["discriminator_start"],
        lecam_weight=config["lecam_regularization_weight"],
        quantizer_weight=config["quantizer_weight"],
    )
    loss.convnext, loss.perceptual = perceptual_of(case)
    parts = config["perceptual_loss"].split("-")
    if len(parts) == 4:
        loss.convnext_weight = float(parts[3]) / float(parts[2])
    return loss


def discriminator_of(case: Case) -> BlurDiscriminator:
    weights = case.part("discriminator.")
    stages = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    model = BlurDiscriminator(base_channels=len(weights["block_in.0.weight"]), num_stages=stages)
    load_titok_discriminator(model, case.state)
    return model.train()


def run_losses(case: Case) -> list[Check]:
    pixels, recon = (case.inputs[name] * 2.0 - 1.0 for name in ("image", "recon"))
    got: dict[str, Tensor | float] = {}
    start = case.config["losses"]["discriminator_start"]
    given = {"commit": "commitment_loss", "vq": "codebook_loss"}
    quantizer = {ours: torch.tensor(case.data["quantizer_losses_given"][theirs]) for ours, theirs in given.items()}
    for run, step in (("gen_before", start - 1), ("gen_after", start)):
        got |= _generator(case, run, step, pixels, recon, quantizer)
        got[f"{run}.quantizer_loss"] = case.config["losses"]["quantizer_weight"] * sum(quantizer.values())
        got |= {f"{run}.{theirs}": quantizer[ours] for ours, theirs in given.items()}
    if "posterior_params" in case.inputs:
        bottleneck = GaussianBottleneck(kl_weight=case.config["vae_kl_weight"])
        losses = bottleneck.losses(bottleneck(case.inputs["posterior_params"]))
        got |= _generator(case, "vae_gen", start, pixels, recon, losses) | {"vae_gen.kl_loss": losses["kl"]}
    got |= _networks(case, pixels, recon)
    got |= _discriminator(case, start, pixels, recon)
    return [_check(case, name, value) for name, value in got.items() if name in case.outputs]


def _generator(
    case: Case, run: str, step: int, pixels: Tensor, recon: Tensor, quantizer: dict[str, Tensor]
) -> dict[str, Tensor | float]:
    loss, discriminator = loss_of(case), discriminator_of(case)
    recon = recon.clone().requires_grad_()
    total, logs = loss.generator_loss(pixels, recon, quantizer, step=step, discriminator=discriminator)
    adversarial = logs.get("generator", torch.zeros(()))
    got: dict[str, Tensor | float] = {
        "total_loss": total,
        "reconstruction_loss": logs["reconstruction"],
        "perceptual_loss": loss.perceptual_weight * logs["perceptual"],
        "gan_loss": adversarial,
        "weighted_gan_loss": loss.adversarial_weight * adversarial,
        "d_weight": loss.adversarial_weight / loss.discriminator_weight,
        "discriminator_factor": loss.discriminator_weight * loss.active(step),
    }
    # The case differentiates by images in [0, 1], of which ours are twice.
    got["grad_recon"] = 2.0 * torch.autograd.grad(total, recon)[0]
    return {f"{run}.{name}": value for name, value in got.items()}


@torch.no_grad()
def _networks(case: Case, pixels: Tensor, recon: Tensor) -> dict[str, Tensor]:
    loss, discriminator = loss_of(case), discriminator_of(case)
    got = {"disc_logits_real": discriminator(pixels), "disc_logits_recon": discriminator(recon)}
    raw = torch.zeros(())
    if loss.convnext is not None:
        got["convnext_logits_real"] = loss.convnext.logits(pixels)
        raw = loss.convnext(pixels, recon)
    if loss.perceptual is not None:
        got["lpips_raw"] = loss.perceptual(pixels, recon).view(-1, 1, 1, 1)
        weight = loss.convnext_weight if loss.convnext is not None else 0.0
        raw = (got["lpips_raw"] + weight * raw) / (1.0 + weight)
    return got | {"perceptual_raw": raw}


def _discriminator(case: Case, step: int, pixels: Tensor, recon: Tensor) -> dict[str, Tensor | float]:
    loss, discriminator = loss_of(case), discriminator_of(case)
    second = 0.9 * case.inputs["image"] * 2.0 - 1.0
    got: dict[str, Tensor | float] = {}
    for call, (real, fake) in enumerate(((pixels, recon), (recon.flip(0), second))):
        discriminator.zero_grad()
        total, logs = loss.discriminator_loss(real, fake, step=step, discriminator=discriminator)
        total.backward()
        assert loss.lecam is not None
        values: dict[str, Any] = {
            "discriminator_loss": total,
            "logits_real": logs["logits_real"],
            "logits_fake": logs["logits_fake"],
            "lecam_loss": loss.lecam_weight * logs["lecam"],
            "ema_real": loss.lecam.ema_real.clone(),
            "ema_fake": loss.lecam.ema_fake.clone(),
            "grad_block_in_weight": _first(discriminator).weight.grad.clone(),
        }
        got |= {f"disc{call}.{name}": value for name, value in values.items()}
    return got


def _first(discriminator: BlurDiscriminator) -> nn.Conv2d:
    layer = discriminator.block_in[0]
    assert isinstance(layer, nn.Conv2d)
    return layer


def _check(case: Case, name: str, got: Tensor | float) -> Check:
    want = case.outputs[name]
    got = torch.as_tensor(got).detach()
    got = got.reshape(want.shape) if got.numel() == 1 else got
    stated = case.tolerance("rtol", default=Tolerance(1e-5, 2e-4))
    return compare(name, got, want, Tolerance((stated.atol or 1e-5) * want.abs().max().item(), stated.rtol))
