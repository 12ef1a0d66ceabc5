"""Continuous tokens: how latents enter a generator, and the diffusion network that draws them (MAR)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.generators.diffusion import Diffusion
from vgen.layers.modulation import Modulation, Modulator
from vgen.layers.sincos import sincos_1d

_EPS = 1e-6


class LatentEmbedding(nn.Module):
    """Token embedding of latents: a projection and a layer norm; NaN stands for a latent that is not known.

    Args:
        channels: of a latent, C.
        dim: width of the generator.
    """

    def __init__(self, *, channels: int, dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(channels, dim)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.mask_token = nn.Parameter(torch.randn(dim) * 0.02)

    def forward(self, latents: Tensor) -> Tensor:
        """Embed latents [..., C] as [..., dim]."""
        unknown = latents.isnan().any(-1, keepdim=True)
        known = self.norm(self.projection(latents.nan_to_num().to(self.projection.weight.dtype)))
        return torch.where(unknown, self.mask_token.to(known.dtype), known)


class _ResidualBlock(nn.Module):
    """x + gate * mlp(modulated norm of x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = Modulation(dim=width, parts=3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(Modulator(condition))
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class DenoisingMLP(nn.Module):
    """Predicts noise and spread of noisy latents (MAR, arXiv 2406.11838, section 3.2; titok.md section 11).

    Args:
        channels: of a latent, C.
        condition_dim: width of the vector that a latent is drawn from.
        width: of the residual stream.
        depth: number of residual blocks.
        time_dim: width of the sinusoidal code of a step, cosines first.
    """

    def __init__(self, *, channels: int, condition_dim: int, width: int, depth: int, time_dim: int = 256) -> None:
        super().__init__()
        self.time_dim = time_dim
        self.time_mlp = nn.Sequential(nn.Linear(time_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.condition_embedding = nn.Linear(condition_dim, width)
        self.input = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(_ResidualBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=_EPS, elementwise_affine=False)
        self.modulation = Modulation(dim=width, parts=2)
        self.output = nn.Linear(width, 2 * channels)

    def forward(self, noisy: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """Map noisy latents [..., C] at steps int64 [...] with conditions [..., condition_dim] to [..., 2 C]."""
        weight = self.output.weight
        sine, cosine = sincos_1d(self.time_dim, times.flatten()).chunk(2, dim=1)
        code = torch.cat([cosine, sine], dim=1).view(*times.shape, -1).to(weight)
        vector = self.time_mlp(code) + self.condition_embedding(condition.to(weight.dtype))
        x = self.input(noisy.to(weight.dtype))
        for block in self.blocks:
            x = block(x, vector)
        shift, scale = self.modulation(Modulator(vector))
        return self.output(self.norm(x) * (1 + scale) + shift)


class LatentHead(nn.Module):
    """Draws continuous tokens from the hidden states of a generator by diffusion (MAR, as MaskGen's KL models use it).

    Args:
        channels: of a latent, C. Taken from the tokenizer.
        num_tokens: tokens N of the grid, whose places are told once more. Taken from the tokenizer.
        dim: width of the generator.
        width: of the denoising network.
        depth: of the denoising network.
        latent_scale: the generator works on the tokenizer's latents times this.
        train_steps: steps of the diffusion.
        repeats: how often training draws step and noise for every latent.
        largest: bound of the latents foreseen while drawing; null = none, as published. The first steps magnify errors
            of the predicted noise so much that a network trained for a short time needs a bound.

    Raises:
        UserError: for a number out of range.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_tokens: int,
        dim: int,
        width: int,
        depth: int = 8,
        latent_scale: float = 0.7525,
        train_steps: int = 1000,
        repeats: int = 4,
        largest: float | None = None,
    ) -> None:
        super().__init__()
        if min(channels, num_tokens, width, depth, repeats) < 1 or train_steps < 2 or latent_scale <= 0:
            raise UserError(
                "generator.latent_head: channels, num_tokens, width, depth and repeats must be at least 1, train_steps "
                "at least 2 and latent_scale positive"
            )
        self.channels, self.latent_scale = channels, latent_scale
        if largest is not None and largest <= 0:
            raise UserError(f"generator.latent_head.largest={largest} must be positive, or null for none")
        self.train_steps, self.repeats, self.largest = train_steps, repeats, largest
        self.places = nn.Embedding(num_tokens, dim)
        self.net = DenoisingMLP(channels=channels, condition_dim=dim, width=width, depth=depth)

    def initialise(self) -> None:
        """Initial weights of MAR: Xavier, normal with deviation 0.02 for the time's network, zero where blocks end."""
        for name, module in self.net.named_modules():
            if isinstance(module, nn.Linear):
                if name.startswith("time_mlp"):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.net.output, *(m.linear for m in self.net.modules() if isinstance(m, Modulation))):
            nn.init.zeros_(layer.weight)

    def loss(self, states: Tensor, latents: Tensor, hidden: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        """Diffusion loss of hidden tokens.

        Args:
            states: float [B, N, dim], from the generator, raster order.
            latents: float32 [B, N, C].
            hidden: bool [B, N], tokens the generator did not see; the others do not count.
            index: int64 [B, N, repeats], steps.
            noise: float32 [B, N, repeats, C].

        Returns:
            Scalar, the mean over hidden tokens and repeats.
        """
        condition = (states + self.places.weight)[:, :, None]
        start = latents.float()[:, :, None].expand_as(noise)
        chain = Diffusion.over(self.train_steps)
        per_draw = chain.loss(lambda noisy, times: self.net(noisy, times, condition), start, index, noise)
        return (per_draw.mean(-1) * hidden).sum() / hidden.sum().clamp(min=1)

    def draw(
        self,
        states: list[Tensor],
        places: Tensor,
        weight: float,
        noises: Callable[[int], Tensor],
        *,
        steps: int,
        temperature: float,
    ) -> Tensor:
        """Draw latents.

        Args:
            states: [B, D, dim], conditional and, with guidance, unconditional.
            places: int64 [D] or [B, D], raster positions.
            weight: of the guidance: noise = uncond + weight (cond - uncond), at every step; the spread is the
                conditional one.
            noises: step -> float32 [B, D, C], standard normal.
            steps: of the diffusion, 1..train_steps.
            temperature: factor of the noise of every step.

        Returns:
            float32 [B, D, C], scaled latents.
        """
        conditions = torch.cat([state + self.places(places) for state in states])

        def predict(noisy: Tensor, times: Tensor) -> Tensor:
            first, *others = self.net(noisy.repeat(len(states), 1, 1), times, conditions).float().chunk(len(states))
            if not others:
                return first
            guess, spread = first.chunk(2, dim=-1)
            null = others[0].chunk(2, dim=-1)[0]
            return torch.cat([null + weight * (guess - null), spread], dim=-1)

        return Diffusion.over(self.train_steps, steps).sample(predict, noises, temperature, self.largest)
