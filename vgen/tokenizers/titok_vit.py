"""The two vision transformers of TiTok (arXiv 2406.07550): pixels to latent tokens, latent tokens to a patch grid.

Module names are those of the published checkpoints. Token axes: G = patches of the image, K = latent tokens.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from vgen.errors import UserError
from vgen.layers.vit import ViTBlock, run_blocks

LatentLayout = Literal["legacy", "per_token"]
LAYOUTS: tuple[LatentLayout, ...] = ("legacy", "per_token")
SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Width, layers and heads of the published sizes."""


def mix_legacy(latents: Tensor) -> Tensor:
    """Read the memory of K vectors of width W as W channels of K positions, [B, K, W] -> [B, W, K].

    The two-stage models were trained with this reshape where a transpose was meant: entry (c, k) of the result is
    element c*K + k of the flattened latents, so that every code mixes channels of many latent tokens.
    """
    batch, count, width = latents.shape
    return latents.reshape(batch, width, count)


class _Trunk(nn.Module):
    """What encoder and decoder share: class embedding, learned positions, blocks between two norms."""

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        heads: int,
        num_patches: int,
        num_latents: int,
        gradient_checkpointing: bool,
    ):
        super().__init__()
        if width % heads:
            raise UserError(f"tokenizer: {heads} attention heads do not divide the width {width}")
        self.gradient_checkpointing = gradient_checkpointing
        self.num_patches, self.num_latents = num_patches, num_latents
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(1, width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(num_patches + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(width**-0.5 * torch.randn(num_latents, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(ViTBlock(dim=width, heads=heads) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)

    def _grid(self, patches: Tensor) -> Tensor:
        """Prepend the class embedding and add positions, [B, G, W] -> [B, 1 + G, W]."""
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.positional_embedding.to(patches.dtype)

    def _run(self, x: Tensor) -> Tensor:
        checkpointing = self.gradient_checkpointing and self.training
        return run_blocks(self.transformer, self.ln_pre(x), gradient_checkpointing=checkpointing)


class LatentEncoder(_Trunk):
    """Image and latent tokens to latents.

    Args:
        image_size: side of the square images, a multiple of patch_size.
        patch_size: side of a patch.
        width: width of the residual stream.
        layers: number of blocks.
        heads: attention heads.
        num_latents: latent tokens K.
        out_channels: channels per latent.
        layout: ``per_token`` maps every latent by itself; ``legacy`` see :func:`mix_legacy`.
        gradient_checkpointing: recompute blocks in the backward pass.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        num_latents: int,
        out_channels: int,
        layout: LatentLayout,
        gradient_checkpointing: bool = False,
    ):
        super().__init__(
            width=width,
            layers=layers,
            heads=heads,
            num_patches=(image_size // patch_size) ** 2,
            num_latents=num_latents,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.layout = layout
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.conv_out = nn.Conv2d(width, out_channels, 1)

    def latent_states(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """Normalised outputs at the latent tokens.

        Args:
            images: [B, 3, image_size, image_size] in [0, 1].
            latent_tokens: learned inputs [K, W].

        Returns:
            [B, K, W].
        """
        patches = self._grid(self.patch_embed(images).flatten(2).transpose(1, 2))
        latents = (latent_tokens + self.latent_token_positional_embedding).to(patches.dtype)
        x = self._run(torch.cat([patches, latents.expand(len(images), -1, -1)], dim=1))
        return self.ln_post(x[:, -self.num_latents :])

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """Images in [0, 1] to latents [B, out_channels, 1, K]."""
        states = self.latent_states(images, latent_tokens)
        channels = mix_legacy(states) if self.layout == "legacy" else states.transpose(1, 2)
        return self.conv_out(channels.unsqueeze(2))


class LatentDecoder(_Trunk):
    """Latents, painted on a grid of mask tokens, to one feature vector per patch and a head.

    Args:
        grid_side: side of the patch grid, in patches.
        width: width of the residual stream.
        layers: number of blocks.
        heads: attention heads.
        num_latents: latent tokens K.
        in_channels: channels per latent.
        patch_size: side of a patch; None gives logits of proxy codes instead of pixels.
        proxy_codes: number of proxy codes where patch_size is None.
        text_length: text tokens appended to the sequence, 0 for none (TA-TiTok, arXiv 2501.07730).
        text_dim: width of their features.
        gradient_checkpointing: recompute blocks in the backward pass.
    """

    def __init__(
        self,
        *,
        grid_side: int,
        width: int,
        layers: int,
        heads: int,
        num_latents: int,
        in_channels: int,
        patch_size: int | None,
        proxy_codes: int = 0,
        text_length: int = 0,
        text_dim: int = 0,
        gradient_checkpointing: bool = False,
    ):
        super().__init__(
            width=width,
            layers=layers,
            heads=heads,
            num_patches=grid_side**2,
            num_latents=num_latents,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.grid_side, self.text_length, self.text_dim = grid_side, text_length, text_dim
        self.decoder_embed = nn.Linear(in_channels, width)
        self.mask_token = nn.Parameter(width**-0.5 * torch.randn(1, 1, width))
        if text_length:
            self.text_guidance_proj = nn.Linear(text_dim, width)
            self.text_guidance_positional_embedding = nn.Parameter(width**-0.5 * torch.randn(text_length, width))
        if patch_size is None:
            # The names of an nn.Sequential with the activation in the middle.
            self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, proxy_codes, 1))
        else:
            self.ffn = nn.Sequential(nn.Conv2d(width, 3 * patch_size**2, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        self.patch_size = patch_size

    def features(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        """Everything but the last layer.

        Args:
            latents: [B, in_channels, 1, K].
            text: features [B, text_length, text_dim]; zeros where a text-aware decoder is given none.

        Returns:
            Proxy logits [B, proxy_codes, g, g], or an image [B, 3, g*p, g*p] that the last convolution smooths.
        """
        x = self.decoder_embed(latents.squeeze(2).transpose(1, 2))
        masks = self._grid(self.mask_token.to(x.dtype).expand(len(x), self.num_patches, -1))
        parts = [masks, x + self.latent_token_positional_embedding.to(x.dtype)]
        if self.text_length:
            if text is None:
                text = x.new_zeros(len(x), self.text_length, self.text_dim)
            parts.append(self.text_guidance_proj(text.to(x.dtype)) + self.text_guidance_positional_embedding)
        x = self.ln_post(self._run(torch.cat(parts, dim=1))[:, 1 : 1 + self.num_patches])
        x = self.ffn(x.transpose(1, 2).unflatten(2, (self.grid_side, self.grid_side)))
        return x if self.patch_size is None else self._unpatch(x)

    def _unpatch(self, x: Tensor) -> Tensor:
        """Pixels of patches, channel index (row * p + column) * 3 + colour, to an image."""
        p = self.patch_size
        x = x.unflatten(1, (p, p, 3)).permute(0, 3, 4, 1, 5, 2)
        return x.flatten(4, 5).flatten(2, 3)

    def forward(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        """Proxy logits [B, proxy_codes, g, g] or pixels [B, 3, g*p, g*p] in about [0, 1]; arguments as `features`."""
        x = self.features(latents, text)
        return x if self.patch_size is None else self.conv_out(x)
