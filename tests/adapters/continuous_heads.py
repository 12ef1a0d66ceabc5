"""Golden cases of heads on continuous tokens: the diffusion head of MAR, which MaskGen-KL draws its tokens by."""

import torch
from adapters import EXACT, Case, Check, Tolerance, UnknownCase, compare
from torch import Tensor

from vgen.checkpoints.convert import load_strict
from vgen.checkpoints.maskgen import denoiser_to_ours
from vgen.generators.diffusion import Diffusion
from vgen.generators.latent_head import LatentHead


def run(case: Case) -> list[Check]:
    """Find out what a case is from its content and run it."""
    if "input_proj.weight" in case.state and "model_output" in case.outputs:
        return run_diffusion_head(case)
    raise UnknownCase("not the diffusion head of MAR; its own backbone and other heads are not built")


def _head(case: Case) -> LatentHead:
    state, tokens = case.state, len(case.inputs["z"])
    width, channels = state["input_proj.weight"].shape
    blocks = {name.split(".")[1] for name in state if name.startswith("res_blocks.")}
    dim = state["cond_embed.weight"].shape[1]
    head = LatentHead(channels=channels, num_tokens=tokens, dim=dim, width=width, depth=len(blocks))
    load_strict(head.net, denoiser_to_ours(state), what=case.name)
    torch.nn.init.zeros_(head.places.weight)
    return head.eval()


@torch.no_grad()
def run_diffusion_head(case: Case) -> list[Check]:
    """Noising, network, loss terms, respaced steps, and samples with and without guidance and noise."""
    head, inputs, config = _head(case), case.inputs, case.config
    target, noise, steps, z = inputs["target"], inputs["noise"], inputs["t"], inputs["z"]
    chain = Diffusion.over(head.train_steps)
    share = chain.alphas[steps][:, None]
    noisy = (share.sqrt() * target + (1 - share).sqrt() * noise).float()
    output = head.net(noisy, steps, z)
    squared = (output.chunk(2, dim=-1)[0] - noise).square().mean(-1)
    per_token = chain.loss(lambda x, t: head.net(x, t, z), target, steps, noise)
    short = Diffusion.over(head.train_steps, config["num_sampling_steps"])
    before = torch.cat([torch.ones(1, dtype=torch.float64), short.alphas[:-1]])

    def drawn(conditions: list[Tensor], weight: float, temperature: float) -> Tensor:
        def noises(step: int) -> Tensor:
            return (inputs["sample_noise"] if step == 0 else inputs["step_noise"][step - 1])[None]

        places, count = torch.arange(len(z)), config["num_sampling_steps"]
        states = [condition[None] for condition in conditions]
        return head.draw(states, places, weight, noises, steps=count, temperature=temperature)[0]

    # One repeat per token, which all count by their mask.
    head.repeats = 1
    once = (z[None], target[None], inputs["mask"][None].bool(), steps[None, :, None], noise[None, :, None])
    got = {
        "x_t": noisy,
        "model_output": output,
        "mse": squared,
        "vb": per_token - squared,
        "loss_per_token": per_token,
        "loss": head.loss(*once).reshape(1),
        "sample_t0": drawn([z], 1.0, 0.0),
        "sample_cfg_t0": drawn([z, inputs["z_uncond"]], config["cfg"], 0.0),
        "sample_temp0p9": drawn([z], 1.0, 0.9),
        "respaced_steps": short.times,
        "respaced_betas": (1 - short.alphas / before).float(),
    }
    return [_compare(name, value, case.outputs[name]) for name, value in got.items() if name in case.outputs]


def _compare(name: str, got: Tensor, want: Tensor) -> Check:
    """Relative to the largest value of a tensor, as the case states."""
    if not want.is_floating_point():
        return compare(name, got, want, EXACT)
    return compare(name, got, want, Tolerance(1e-4 * want.abs().max().item(), 0.0))
