"""Training of a generator of continuous tokens by the diffusion loss of its latent head (MAR, MaskGen-KL)."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vgen.errors import UserError
from vgen.generators.latent_head import LatentHead
from vgen.random import keyed_normal, keyed_uniform
from vgen.tokenizers.titok import TiTok
from vgen.training.generator_module import GeneratorModule

_POSTERIOR_STREAM, _TIME_STREAM, _NOISE_STREAM = 107, 108, 109


class LatentModule(GeneratorModule):
    """Diffusion loss of hidden latents; arguments as of :class:`GeneratorModule`.

    Where the public code draws one share of hidden tokens per batch, every sample has its own here, so that a sample's
    draws do not depend on its batch; the loss is the mean over the hidden tokens of the batch either way.

    Raises:
        UserError: for settings of a cross entropy.
    """

    def __init__(self, *, label_smoothing: float = 0.0, visible_weight: float | None = None, **options: Any) -> None:
        if label_smoothing != 0 or visible_weight is not None:
            raise UserError(
                "task.label_smoothing and visible_weight have no effect on continuous tokens, whose hidden ones alone "
                "count in a diffusion loss; set them to 0 and null"
            )
        super().__init__(**options)

    @property
    def head(self) -> LatentHead:
        """What draws the latents."""
        assert self.generator.latent_head is not None
        return self.generator.latent_head

    def token_ids(self, batch: dict[str, Any]) -> Tensor:
        """Latents of a batch, float32 [B, N, C], drawn from the tokenizer's posterior and scaled."""
        return self.latents(batch, epoch=self.epoch)

    def latents(self, batch: dict[str, Any], *, epoch: int) -> Tensor:
        """Latents float32 [B, N, C]; the draw is a function of (seed, epoch, image)."""
        tokenizer = self.tokenizer
        assert isinstance(tokenizer, TiTok)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            posterior = tokenizer.posterior(batch["pixels"])
            entries = torch.arange(posterior.mean[0].numel(), device=posterior.mean.device)
            noise = keyed_normal(self.seed, _POSTERIOR_STREAM, epoch, batch["index"][:, None], entries)
            sample = posterior.sample(noise.view_as(posterior.mean))
        return sample[:, :, 0].transpose(1, 2) * self.head.latent_scale

    def objective(self, batch: dict[str, Any], latents: Tensor, *, epoch: int, drop: Tensor | None) -> Tensor:
        """Diffusion loss of the hidden ones of latents [B, N, C]; all draws are functions of (seed, epoch, image)."""
        head, index = self.head, batch["index"]
        hidden = self.hidden(index, epoch=epoch)
        assert hidden is not None
        states = self.generator.logits(latents, self.condition(batch), self.plan, drop=drop, hidden=hidden)
        place, repeat, channel = (
            torch.arange(count, device=index.device) for count in (latents.shape[1], head.repeats, head.channels)
        )
        image = index[:, None, None]
        times = keyed_uniform(self.seed, _TIME_STREAM, epoch, image, place[:, None], repeat) * head.train_steps
        noise = keyed_normal(
            self.seed, _NOISE_STREAM, epoch, image[..., None], place[:, None, None], repeat[:, None], channel
        )
        with torch.autocast(self.device.type, enabled=False):
            return head.loss(states, latents, hidden, times.long(), noise)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Diffusion loss: squared error of the noise plus bits of the variational bound."""
        drop = self.dropped(batch["index"])
        loss = self.objective(batch, self.token_ids(batch), epoch=self.epoch, drop=drop)
        self.record(loss=loss)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same on held-out images, conditions kept (if training keeps any); every image keeps its draws."""
        drop = torch.ones_like(batch["index"], dtype=torch.bool) if self.condition_dropout == 1 else None
        loss = self.objective(batch, self.latents(batch, epoch=0), epoch=0, drop=drop)
        self.sum_validation(len(batch["index"]), loss=loss)

    def flops_per_image(self, batch: dict[str, Any]) -> float:
        """Operations of forward and backward (twice the forward) per image, those of the latent head included."""
        one = {name: value[:1] for name, value in batch.items() if isinstance(value, Tensor)}
        latents = self.latents(one, epoch=0)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.objective(one, latents, epoch=0, drop=None)
        return 3.0 * counter.get_total_flops()
