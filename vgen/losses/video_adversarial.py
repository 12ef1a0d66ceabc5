"""A discriminator that judges overlapping blocks of space and time."""

import math

from torch import Tensor, nn

from vgen.errors import UserError


class PatchGAN3d(nn.Module):
    """PatchGAN over clips, as MAGVIT (arXiv 2212.05199) and its successors train against, independent of the batch.

    Args:
        base_channels: channels of the first layer, doubled per layer up to eight times.
        num_layers: normalised layers; all but the last halve the frame, as the first layer does.
        time_layers: of the layers that halve the frame, so many (from the second on) halve time as well.

    Raises:
        UserError: for sizes below 1, or more halvings of time than layers that halve the frame.
    """

    def __init__(self, *, base_channels: int = 64, num_layers: int = 3, time_layers: int = 2):
        super().__init__()
        if min(base_channels, num_layers) < 1 or not 0 <= time_layers <= num_layers - 1:
            raise UserError(
                "discriminator.base_channels and num_layers must be at least 1, and time_layers below num_layers"
            )
        widths = [base_channels * min(2**i, 8) for i in range(num_layers + 1)]

        def conv(before: int, after: int, time: int, space: int) -> nn.Module:
            return nn.Conv3d(before, after, (3, 4, 4), stride=(time, space, space), padding=1)

        layers: list[nn.Module] = [conv(3, widths[0], 1, 2), nn.LeakyReLU(0.2)]
        for index in range(num_layers):
            halves = index < num_layers - 1
            time = 2 if halves and index < time_layers else 1
            width = widths[index + 1]
            layers += [conv(widths[index], width, time, 2 if halves else 1), nn.GroupNorm(math.gcd(32, width), width)]
            layers.append(nn.LeakyReLU(0.2))
        self.main = nn.Sequential(*layers, conv(widths[-1], 1, 1, 1))
        self.min_size = 3 * 2**num_layers
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """Clips in [-1, 1] [B, 3, T, H, W] to logits [B, 1, t, h, w].

        Raises:
            UserError: if the frames are too small for the number of layers.
        """
        if pixels.dim() != 5 or min(pixels.shape[3:]) < self.min_size:
            raise UserError(
                f"this PatchGAN3d judges clips [B, 3, T, H, W] with H and W at least {self.min_size}, got "
                f"{list(pixels.shape)}; lower discriminator.num_layers"
            )
        return self.main(pixels)
