"""LARP's discriminator and its losses (arXiv 2410.21264, appendix; the transformer is that of the tokenizer)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.layers.sincos import sincos_3d
from vgen.losses.vq import VQLoss
from vgen.tokenizers.larp_transformer import FINAL_EPS, ParallelTransformer, PatchEmbed, init_linear


class ClipDiscriminator(nn.Module):
    """Transformer that judges a whole clip, one logit each.

    Args:
        image_size: side in pixels of the frames.
        num_frames: frames of a clip.
        patch: (frames, rows, columns) of a patch.
        dim: width.
        depth: number of blocks.
        heads: attention heads.
        gradient_checkpointing: recompute blocks in the backward pass.

    Raises:
        UserError: if a size does not divide.
    """

    def __init__(
        self,
        *,
        image_size: int,
        num_frames: int,
        patch: tuple[int, int, int],
        dim: int = 512,
        depth: int = 12,
        heads: int = 8,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        time, rows, columns = patch
        if num_frames % time or image_size % rows or image_size % columns or dim % heads or dim % 4:
            raise UserError(
                f"discriminator: patch={list(patch)} must divide {num_frames} frames of {image_size} pixels, and dim="
                f"{dim} must be a multiple of 4 and of heads={heads}"
            )
        self.shape = (num_frames, image_size, image_size)
        grid = (num_frames // time, image_size // rows, image_size // columns)
        self.x_embedder = PatchEmbed(dim, (time, rows, columns))
        self.encoder_pos_embed: Tensor
        self.register_buffer("encoder_pos_embed", sincos_3d(dim, grid)[None])
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.transformer_encoder = ParallelTransformer(
            dim=dim, heads=heads, depth=depth, gradient_checkpointing=gradient_checkpointing
        )
        self.norm_final = nn.LayerNorm(dim, eps=FINAL_EPS)
        self.fc = nn.Linear(dim, 1)
        self.running: Tensor
        # Exponential means of the real and the fake logit, for LeCam; here, so that a resumed run continues with them.
        self.register_buffer("running", torch.zeros(2))
        self.apply(init_linear)

    def forward(self, pixels: Tensor) -> Tensor:
        """Clips in [-1, 1] [B, 3, T, H, W] to logits [B, 1].

        Raises:
            UserError: if the clips have another shape than configured.
        """
        if tuple(pixels.shape[2:]) != self.shape:
            raise UserError(f"the discriminator judges clips of (T, H, W) = {self.shape}, got {list(pixels.shape)}")
        patches = self.x_embedder((pixels + 1) / 2) + self.encoder_pos_embed
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        x = self.transformer_encoder(x[:, :0], x)
        return self.fc(self.norm_final(x[:, 0]))


def smoothed_logistic_discriminator(real: Tensor, fake: Tensor, noise: float) -> Tensor:
    """Sum of the two binary cross-entropies with noisy labels.

    Args:
        real: logits of originals.
        fake: logits of reconstructions, the same shape.
        noise: real labels are 1 - |n|, at least 0.7, fake ones |n|, at most 0.3, with n of this standard deviation.
    """
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    if noise > 0:
        ones = (ones - torch.randn_like(ones).abs() * noise).clamp(min=0.7)
        zeros = (torch.randn_like(zeros).abs() * noise).clamp(max=0.3)
    return F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)


def lecam(real: Tensor, fake: Tensor, running: Tensor) -> Tensor:
    """LeCam regularisation (Tseng et al., arXiv 2104.03310) of mean logits against running means [real, fake]."""
    return F.relu(real.mean() - running[1]).square() + F.relu(running[0] - fake.mean()).square()


class LARPLoss(VQLoss):
    """L1, LPIPS and an adversarial term against noisy labels, with LeCam; the discriminator rests between its turns.

    The original multiplies LeCam by its weight of 0.001 twice, so ``lecam_weight: 1.0e-6`` is what it trains with. Its
    discriminator steps before the tokenizer, ours after it, as for all tokenizers here.

    Args:
        label_noise: see :func:`smoothed_logistic_discriminator`.
        lecam_weight: weight of LeCam.
        lecam_decay: decay of the running logits.
        discriminator_every: the discriminator learns at every so many optimizer steps.
        shared: arguments of :class:`vgen.losses.vq.VQLoss`.

    Raises:
        UserError: if an option is out of range.
    """

    def __init__(
        self, *, label_noise: float, lecam_weight: float, lecam_decay: float, discriminator_every: int, **shared: Any
    ):
        super().__init__(**shared)
        if label_noise < 0 or lecam_weight < 0 or not 0 <= lecam_decay < 1 or discriminator_every < 1:
            raise UserError(
                "loss: label_noise and lecam_weight must not be negative, lecam_decay must lie in [0, 1) and "
                "discriminator_every be at least 1"
            )
        self.label_noise, self.lecam_weight, self.lecam_decay = label_noise, lecam_weight, lecam_decay
        self.discriminator_every = discriminator_every

    def judges(self, step: int) -> bool:
        """Whether the discriminator learns at global step `step` (from 1)."""
        return self.active(step) and step % self.discriminator_every == 0

    def discriminator_loss(
        self, pixels: Tensor, reconstruction: Tensor, *, step: int, discriminator: nn.Module
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective of a :class:`ClipDiscriminator`; arguments and results as in VQLoss, not weighted."""
        assert isinstance(discriminator, ClipDiscriminator)
        real = discriminator(pixels.detach()).float()
        fake = discriminator(reconstruction.detach()).float()
        raw = smoothed_logistic_discriminator(real, fake, self.label_noise)
        regular = lecam(real, fake, discriminator.running)
        with torch.no_grad():
            means = torch.stack([real.mean(), fake.mean()])
            discriminator.running.lerp_(means, 1 - self.lecam_decay)
        logs = {"discriminator": raw, "lecam": regular, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return raw + self.lecam_weight * regular, {name: value.detach() for name, value in logs.items()}
