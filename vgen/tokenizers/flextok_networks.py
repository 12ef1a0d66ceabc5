"""FlexTok's register encoder and rectified-flow decoder (arXiv 2502.13967)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgen.errors import UserError
from vgen.tokenizers.flextok_layers import (
    VISIBILITIES,
    DecoderBlock,
    EncoderBlock,
    PatchPositions,
    TimeEmbedding,
    Visibility,
    initialise_linear,
    layer_norm,
    patchify,
    unpatchify,
    visibility_mask,
    zero,
)


class _Trunk(nn.Module):
    """What both networks share: patches of a latent map with positions, and a stack of blocks."""

    def __init__(
        self,
        *,
        channels: int,
        dim: int,
        depth: int,
        head_dim: int,
        grid: tuple[int, int],
        patch: int,
        positions: str,
        gradient_checkpointing: bool,
        block: type[EncoderBlock],
    ) -> None:
        super().__init__()
        if min(dim, depth, head_dim, patch) < 1 or dim % head_dim:
            raise UserError(
                f"FlexTok: dim={dim}, depth={depth}, head_dim={head_dim} and patch={patch} must be positive and "
                "head_dim must divide dim (published: 64)"
            )
        self.dim, self.patch = dim, patch
        self.gradient_checkpointing = gradient_checkpointing
        self.patch_embed = nn.Linear(patch * patch * channels, dim)
        self.positions = PatchPositions(dim=dim, grid=grid, kind=positions)
        self.blocks = nn.ModuleList(block(dim=dim, head_dim=head_dim) for _ in range(depth))
        self._compiled: list[Callable[..., Tensor]] | None = None

    def embed(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to patches without positions [B, h / patch, w / patch, dim].

        Raises:
            UserError: if a side is not divisible by the patch.
        """
        if latents.shape[2] % self.patch or latents.shape[3] % self.patch:
            raise UserError(f"latents of {latents.shape[2]} x {latents.shape[3]} do not divide by patch={self.patch}")
        return self.patch_embed(patchify(latents.to(self.patch_embed.weight.dtype), self.patch))

    def compile_blocks(self) -> None:
        """Compile every block for training; names of parameters stay."""
        self._compiled = [torch.compile(block.forward) for block in self.blocks]

    def run(self, index: int, *arguments: Tensor | int | None) -> Tensor:
        """Run a block: compiled in training only, where shapes do not change, and recomputed where asked for."""
        block: Callable[..., Tensor] = self.blocks[index]
        if not (self.training and torch.is_grad_enabled()):
            return block(*arguments)
        if self._compiled is not None:
            block = self._compiled[index]
        if self.gradient_checkpointing:
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)


class RegisterEncoder(_Trunk):
    """Latents [B, C, h, w] to register vectors [B, K, code_dim] before quantization.

    Args:
        channels: of the latents.
        dim: width.
        depth: number of blocks.
        grid: rows and columns of patches the position table covers.
        num_registers: number K.
        code_dim: length of a register's output.
        head_dim: width of a head.
        patch: side of a patch in latents.
        register_std: spread of the learned registers at the start.
        visibility: see :func:`vgen.tokenizers.flextok_layers.visibility_mask`.
        positions: see :class:`vgen.tokenizers.flextok_layers.PatchPositions`.
        gradient_checkpointing: recompute blocks in the backward pass.

    Raises:
        UserError: for options that do not fit.
    """

    def __init__(
        self,
        *,
        channels: int,
        dim: int,
        depth: int,
        grid: tuple[int, int],
        num_registers: int,
        code_dim: int,
        head_dim: int = 64,
        patch: int = 2,
        register_std: float = 0.02,
        visibility: Visibility = "causal_last",
        positions: str = "sincos",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            channels=channels,
            dim=dim,
            depth=depth,
            head_dim=head_dim,
            grid=grid,
            patch=patch,
            positions=positions,
            gradient_checkpointing=gradient_checkpointing,
            block=EncoderBlock,
        )
        if num_registers < 1 or visibility not in VISIBILITIES:
            raise UserError(
                f"FlexTok: num_tokens={num_registers} must be positive and visibility={visibility} one of "
                f"{', '.join(VISIBILITIES)}"
            )
        self.visibility: Visibility = visibility
        self.registers = nn.Parameter(torch.empty(num_registers, dim))
        self.head = nn.Linear(dim, code_dim)
        initialise_linear(self)
        _spread(self.registers, register_std)

    @torch.no_grad()
    def spread_outputs(self, latents: Tensor) -> None:
        """Set the last layer so that every channel has mean 0 and spread 1 over the registers of these latents."""
        outputs = self(latents).float().flatten(0, 1)
        spread, mean = torch.std_mean(outputs, dim=0)
        self.head.weight.div_(spread[:, None])
        self.head.bias.copy_((self.head.bias - mean) / spread)

    def features(self, latents: Tensor) -> Tensor:
        """Output of the last block: patches, then registers, [B, P + K, dim]."""
        patches = self.positions(self.embed(latents)).flatten(1, 2)
        x = torch.cat([patches, self.registers.to(patches.dtype).expand(len(patches), -1, -1)], dim=1)
        mask = None
        if self.visibility != "full":
            mask = visibility_mask(self.visibility, patches.shape[1], len(self.registers), device=x.device)
        for index in range(len(self.blocks)):
            x = self.run(index, x, mask)
        return x

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents [B, C, h, w] to registers [B, K, code_dim]."""
        return self.head(layer_norm(self.features(latents)[:, -len(self.registers) :]))


@dataclass(frozen=True)
class Condition:
    """What the decoder knows of the pictures.

    Attributes:
        registers: [B, n, dim].
        bias: float32 [B, n], added to the attention logits of the registers; None = nothing.
    """

    registers: Tensor
    bias: Tensor | None = None


class FlowDecoder(_Trunk):
    """Velocity of noised latents, given the codes of a picture's tokens.

    Args:
        channels: of the latents.
        dim: width.
        depth: number of blocks.
        grid: rows and columns of patches the position table covers.
        num_registers: number K.
        code_dim: length of a code.
        head_dim: width of a head.
        patch: side of a patch in latents.
        register_std: spread of the registers' learned positions at the start.
        positions: see :class:`vgen.tokenizers.flextok_layers.PatchPositions`.
        time_features: see :class:`vgen.tokenizers.flextok_layers.TimeEmbedding`.
        max_time: likewise.
        gradient_checkpointing: recompute blocks in the backward pass.

    Raises:
        UserError: for options that do not fit.
    """

    def __init__(
        self,
        *,
        channels: int,
        dim: int,
        depth: int,
        grid: tuple[int, int],
        num_registers: int,
        code_dim: int,
        head_dim: int = 64,
        patch: int = 2,
        register_std: float = 0.02,
        positions: str = "sincos",
        time_features: int = 256,
        max_time: float = 1.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            channels=channels,
            dim=dim,
            depth=depth,
            head_dim=head_dim,
            grid=grid,
            patch=patch,
            positions=positions,
            gradient_checkpointing=gradient_checkpointing,
            block=DecoderBlock,
        )
        self.num_registers = num_registers
        self.from_codes = nn.Linear(code_dim, dim)
        self.register_positions = nn.Parameter(torch.empty(1, 1, dim, num_registers))
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.null_token = nn.Parameter(torch.empty(dim))
        self.time = TimeEmbedding(dim=dim, features=time_features, max_time=max_time)
        self.head_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.head = nn.Linear(dim, patch * patch * channels)
        initialise_linear(self)
        _spread(self.register_positions, register_std)
        for parameter in (self.mask_token, self.null_token):
            nn.init.trunc_normal_(parameter, std=0.02)
        zero(self.head_modulation, self.head, *(block.get_submodule("modulation") for block in self.blocks))

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Registers with their positions [B, n, dim] of codes [B, n, code_dim], n at most K."""
        x = self.from_codes(codes.to(self.from_codes.weight.dtype))
        return x + self.register_positions[0, 0, :, : codes.shape[1]].T

    def condition(self, codes: Tensor, keep: Tensor | None = None, null: Tensor | None = None) -> Condition:
        """The plain form of the condition: always K registers.

        Args:
            codes: [B, n, code_dim], n at most K; what stands from `keep` on does not matter.
            keep: int64 [B], registers kept, the others become the mask token; None = the n given.
            null: bool [B], samples without condition: all registers become the null token.
        """
        registers = self.embed_codes(codes)
        batch, given, dim = registers.shape
        if given < self.num_registers:
            padding = registers.new_zeros(batch, self.num_registers - given, dim)
            registers = torch.cat([registers, padding], dim=1)
        if keep is None:
            keep = torch.full((batch,), given, device=codes.device)
        masked = torch.arange(self.num_registers, device=codes.device) >= keep[:, None]
        registers = torch.where(masked[..., None], self.mask_token.to(registers.dtype), registers)
        if null is not None:
            registers = torch.where(null[:, None, None], self.null_token.to(registers.dtype), registers)
        return Condition(registers)

    def short_condition(self, codes: Tensor, keep: Tensor | None = None) -> Condition:
        """The same condition in fewer registers: equal results, because the K - k mask tokens are identical.

        They stay identical through all layers, so one of them with ln(K - k) added to its attention logit stands for
        all. Arguments as in :meth:`condition`; the result has max(keep) + 1 registers, or K if all are kept.
        """
        registers = self.embed_codes(codes)
        batch, given, dim = registers.shape
        kept = torch.full((batch,), given, device=codes.device) if keep is None else keep
        longest = given if keep is None else int(keep.max())
        if longest == self.num_registers and bool((kept == longest).all()):
            return Condition(registers)
        slots = torch.arange(longest + 1, device=codes.device)
        registers = torch.cat([registers[:, :longest], registers.new_zeros(batch, 1, dim)], dim=1)
        stands = slots == kept[:, None]
        registers = torch.where((slots >= kept[:, None])[..., None], self.mask_token.to(registers.dtype), registers)
        dropped = (self.num_registers - kept).float().log()[:, None]  # -inf where nothing is dropped
        bias = torch.zeros(batch, longest + 1, device=codes.device)
        bias = bias.masked_fill(slots > kept[:, None], -math.inf)
        return Condition(registers, torch.where(stands, dropped, bias))

    def null_condition(self, batch: int) -> Condition:
        """No condition at all, as one register that stands for K null tokens."""
        registers = self.null_token.expand(batch, 1, -1)
        return Condition(registers, torch.full((batch, 1), math.log(self.num_registers), device=registers.device))

    def forward(self, latents: Tensor, time: Tensor, condition: Condition, taps: Iterable[int] = ()) -> "Velocity":
        """Predict the velocity noise - clean.

        Args:
            latents: noised latents [B, C, h, w].
            time: [B], 0 = clean, 1 = noise.
            condition: see :meth:`condition`, :meth:`short_condition`, :meth:`null_condition`.
            taps: indices of blocks whose patches are wanted.
        """
        wanted = set(taps)
        patches = self.positions(self.embed(latents))
        rows, columns = patches.shape[1:3]
        count = rows * columns
        x = torch.cat([patches.flatten(1, 2), condition.registers.to(patches.dtype)], dim=1)
        embedding = self.time(time)
        mask = None
        if condition.bias is not None:
            bias = torch.cat([condition.bias.new_zeros(len(x), count), condition.bias], dim=1)
            mask = bias[:, None, None, :]
        tapped = []
        for index in range(len(self.blocks)):
            x = self.run(index, x, mask, embedding, count)
            if index in wanted:
                tapped.append(x[:, :count].unflatten(1, (rows, columns)))
        x = layer_norm(x[:, :count])
        shift, scale = self.head_modulation(embedding)[:, None].chunk(2, dim=-1)
        velocity = self.head(x * (1 + scale) + shift).unflatten(1, (rows, columns))
        return Velocity(unpatchify(velocity, self.patch), tapped)


def _spread(parameter: nn.Parameter, std: float) -> None:
    if not std > 0:
        raise UserError(f"FlexTok: register_std={std} must be positive")
    nn.init.trunc_normal_(parameter, std=std)


@dataclass(frozen=True)
class Velocity:
    """Result of the decoder.

    Attributes:
        velocity: [B, C, h, w].
        features: for each tapped block its patches [B, rows, columns, dim].
    """

    velocity: Tensor
    features: list[Tensor]
