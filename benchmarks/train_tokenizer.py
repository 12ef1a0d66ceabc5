"""How fast a VQ-GAN trains against its discriminator, plain and compiled.

    python -m benchmarks.train_tokenizer --tokenizer vq_32 --batch 256

Random pictures, bfloat16 autocast, Adam for both networks, L1 and hinge losses with the discriminator taking part from
the first step, as in experiment=cifar10_tokenizer after its start. Compiled means what task.compile=true compiles: the
encoder, and the decoder up to its last layer.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from benchmarks.train import seconds_per_call
from vgen.errors import reported
from vgen.losses.adversarial import PatchGAN
from vgen.losses.vq import VQLoss
from vgen.runtime import pick_device
from vgen.tokenizers.vqgan import VQGAN
from vgen.training.settings import make

CONFIGS = Path(__file__).parents[1] / "configs" / "tokenizer"
HEADER = "| tokenizer | batch | variant | first step s | s/step | images/s | GiB |\n|---|---|---|---|---|---|---|"
ADVERSARIAL_WEIGHT = 0.02


class Training:
    """A tokenizer and its discriminator in training on random pictures.

    Args:
        tokenizer: the network, float32 weights.
        batch: pictures per step.
        compiled: compile the tokenizer.
    """

    def __init__(self, tokenizer: VQGAN, *, batch: int, compiled: bool) -> None:
        self.tokenizer = tokenizer.train()
        self.device = tokenizer.last_layer.device
        self.discriminator = PatchGAN(num_layers=2).to(self.device).train()
        self.loss = VQLoss(reconstruction="l1", adversarial_weight=ADVERSARIAL_WEIGHT, perceptual="none")
        self.loss.adversarial_start = 0
        side = tokenizer.image_size
        self.pixels = torch.rand(batch, 3, side, side, device=self.device) * 2.0 - 1.0
        fused = self.device.type == "cuda"
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=1e-4, fused=fused) for network in (tokenizer, self.discriminator)
        ]
        if compiled:
            tokenizer.compile_parts()

    def step(self) -> None:
        """One step of both networks."""
        with torch.autocast(self.device.type, torch.bfloat16):
            output = self.tokenizer(self.pixels)
            total, _ = self.loss.generator_loss(
                self.pixels, output.reconstruction, output.losses, step=1, discriminator=self.discriminator
            )
        self._minimise(total, 0)
        with torch.autocast(self.device.type, torch.bfloat16):
            total, _ = self.loss.discriminator_loss(
                self.pixels, output.reconstruction.detach(), step=1, discriminator=self.discriminator
            )
        self._minimise(total, 1)

    def _minimise(self, total: torch.Tensor, which: int) -> None:
        total.backward()
        parameters = [p for group in self.optimizers[which].param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizers[which].step()
        self.optimizers[which].zero_grad(set_to_none=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="vq_32", help="a VQ-GAN of configs/tokenizer")
    parser.add_argument("--channels", type=int, help="its base channels; default: as configured")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--variants", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every variant that was asked for."""
    given = parse(arguments)
    with reported():
        device = pick_device(given.device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        print(HEADER, flush=True)
        for variant in given.variants:
            settings = yaml.safe_load((CONFIGS / f"{given.tokenizer}.yaml").read_text())
            if given.channels:
                settings["base_channels"] = given.channels
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            tokenizer = make(settings, "tokenizer").to(device)
            training = Training(tokenizer, batch=given.batch, compiled=variant == "compiled")
            first = seconds_per_call(training.step, device, 1)
            seconds_per_call(training.step, device, min(3, given.steps))
            seconds = seconds_per_call(training.step, device, given.steps)
            peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
            print(
                f"| {given.tokenizer} | {given.batch} | {variant} | {first:.1f} | {seconds:.4f} "
                f"| {given.batch / seconds:.0f} | {peak:.1f} |",
                flush=True,
            )
            del training, tokenizer


if __name__ == "__main__":
    main()
