"""Training of FlexTok's encoder and decoder: rectified flow with nested dropout, on latents of a frozen VAE."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vgen.errors import UserError
from vgen.losses.repa import REPALoss
from vgen.random import keyed_normal, keyed_uniform
from vgen.tokenizers.flextok import FlexTok
from vgen.tokenizers.flow import TimeSampler, noised
from vgen.tokenizers.nested_dropout import LENGTHS, kept_lengths
from vgen.training.module import MakeOptimizer, TrainingModule

_TIMES, _LENGTHS, _NULL, _NOISE, _POSTERIOR, _UNROUNDED = range(311, 317)
_STEEP = 1.5
_VALIDATION = 2**31  # an epoch no training reaches, so that validation always draws the same


class FlexTokModule(TrainingModule):
    """One loss, one optimizer: the velocity of noised latents, given a random number of leading tokens.

    All random numbers of a picture are keyed by (seed, epoch, picture); only stratified times depend on the batch.

    Args:
        tokenizer: network to train; its VAE stays as it is.
        optimizer: function of (named parameters, names of matrices).
        encoder_lr_scale: factor on the learning rate of the encoder. At first the decoder does not listen to the
            registers, and an encoder that moves fast meanwhile gives all pictures the same tokens.
        times: distribution of the flow's times.
        lengths: of nested dropout, see :func:`vgen.tokenizers.nested_dropout.kept_lengths`.
        null_probability: share of pictures trained without any token, for guidance.
        saturation_weight: weight of the mean square by which the encoder's outputs lie outside [-1.5, 1.5], where FSQ's
            bound reaches every level and still has a slope. Beyond, a channel soon has one level and no gradient.
        unrounded_probability: share of pictures whose codes are bounded but not rounded in training.
        sample_posterior: train on samples of the VAE's posterior instead of its mean.
        repa: alignment loss, or None.
        compile_network: compile the blocks of both transformers.
        shared: arguments of :class:`vgen.training.module.TrainingModule` other than the network.

    Raises:
        UserError: for options out of range.
    """

    task = "tokenizer"

    def __init__(
        self,
        *,
        tokenizer: FlexTok,
        optimizer: MakeOptimizer,
        encoder_lr_scale: float,
        times: TimeSampler,
        lengths: str,
        null_probability: float,
        saturation_weight: float,
        unrounded_probability: float,
        sample_posterior: bool,
        repa: REPALoss | None,
        compile_network: bool,
        **shared: Any,
    ) -> None:
        if lengths not in LENGTHS:
            raise UserError(f"task.lengths={lengths} is unknown; choose one of {', '.join(LENGTHS)}")
        if not encoder_lr_scale > 0:
            raise UserError(f"task.encoder_lr_scale={encoder_lr_scale} must be positive")
        if saturation_weight < 0:
            raise UserError(f"task.saturation_weight={saturation_weight} must not be negative")
        for name, share in (
            ("null_probability", null_probability),
            ("unrounded_probability", unrounded_probability),
        ):
            if not 0.0 <= share < 1.0:
                raise UserError(f"task.{name}={share} must lie in [0, 1)")
        if repa is not None and not 0 <= repa.block < len(tokenizer.decoder.blocks):
            raise UserError(f"task.repa.block={repa.block} must be one of the {len(tokenizer.decoder.blocks)} blocks")
        super().__init__(network=tokenizer, **shared)
        self.repa = repa
        self.times, self.lengths = times, lengths
        self.saturation_weight = saturation_weight
        self.null_probability, self.unrounded_probability = null_probability, unrounded_probability
        self.sample_posterior = sample_posterior
        self._make_optimizer, self._encoder_lr_scale = optimizer, encoder_lr_scale
        self._matrices = self.matrices()
        if compile_network:
            tokenizer.compile_parts()

    @property
    def tokenizer(self) -> FlexTok:
        """The network, as a FlexTok."""
        assert isinstance(self.network, FlexTok)
        return self.network

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer over encoder, decoder and, where there is one, the projector of the alignment loss."""
        optimizer = self.make_optimizer(self._make_optimizer, "", self._matrices)
        encoder = {id(parameter) for parameter in self.tokenizer.encoder.parameters()}
        for group in list(optimizer.param_groups):
            slow = [parameter for parameter in group["params"] if id(parameter) in encoder]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in encoder]
            optimizer.add_param_group({**group, "params": slow, "lr_scale": self._encoder_lr_scale})
        return optimizer

    def objective(
        self, batch: Mapping[str, Any], epoch: int, *, null_probability: float, unrounded_probability: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Flow loss, alignment loss (0 without), saturation of the codes and ids of a batch."""
        tokenizer, pixels, index = self.tokenizer, batch["pixels"], batch["index"]

        def normal(stream: int) -> Tensor:
            return keyed_normal(self.seed, stream, epoch, index[:, None], position).view(-1, *tokenizer.latent_shape)

        position = torch.arange(math.prod(tokenizer.latent_shape), device=index.device)
        # In one call, because every call is some fifty small kernels.
        streams = torch.arange(_TIMES, _UNROUNDED + 1, device=index.device)
        uniform = dict(enumerate(keyed_uniform(self.seed, streams[:, None], epoch, index), _TIMES))
        latents = tokenizer.latents(pixels, normal(_POSTERIOR) if self.sample_posterior else None)
        outputs = tokenizer.encoder(latents)
        codes, ids = tokenizer.fsq(outputs, uniform[_UNROUNDED] < unrounded_probability)
        raw = uniform[_TIMES]
        if self.times.kind == "logit_normal":
            raw = keyed_normal(self.seed, _TIMES, epoch, index)
        time = self.times.times(raw).float()
        keep = kept_lengths(uniform[_LENGTHS], tokenizer.num_tokens, self.lengths)
        null = uniform[_NULL] < null_probability
        noise = normal(_NOISE)
        taps = () if self.repa is None else (self.repa.block,)
        condition = tokenizer.decoder.condition(codes, keep, null)
        output = tokenizer.decoder(noised(latents, noise, time), time, condition, taps)
        loss = F.mse_loss(output.velocity.float(), noise - latents)
        aligned = loss.new_zeros(()) if self.repa is None else self.repa(pixels, output.features[0])
        saturation = F.relu(outputs.float().abs() - _STEEP).square().mean()
        return loss, aligned, saturation, ids

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean squared error of the velocity, plus the weighted saturation and alignment losses."""
        flow, aligned, saturation, ids = self.objective(
            batch,
            self.epoch,
            null_probability=self.null_probability,
            unrounded_probability=self.unrounded_probability,
        )
        total = flow + self.saturation_weight * saturation
        if self.repa is not None:
            total = total + self.repa.weight * aligned
            self.record(repa=aligned)
        self.record(loss=total, flow=flow, saturation=saturation, **self.tokenizer.statistics(ids))
        return total

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Flow loss on held-out pictures with prefixes of their tokens, and what these take off that without any."""
        flow, _, _, ids = self.objective(batch, _VALIDATION, null_probability=0.0)
        alone = self.objective(batch, _VALIDATION, null_probability=1.0)[0]
        self.sum_validation(len(ids), loss=flow, gain=alone - flow)

    def reconstruct(self, pixels: Tensor) -> Tensor:
        """Reconstructions from few to all tokens, one after the other: [lengths * B, 3, H, W]."""
        ids = self.tokenizer.encode(pixels)
        index = torch.arange(len(ids), device=ids.device)
        most = self.tokenizer.num_tokens
        lengths = sorted({min(4**power, most) for power in range(most.bit_length() // 2 + 1)} | {most})
        return torch.cat([self.tokenizer.decode(ids[:, :k], sample_index=index) for k in lengths])
