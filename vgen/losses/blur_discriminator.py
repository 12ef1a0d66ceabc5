"""The discriminator of TiTok's training: a few blurred halvings, judged on a fixed 16 x 16 map; and LeCam."""

from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import UserError

_SIDE = 16
_MOST = 512
_SLOPE = 0.1


class BlurDownsample(nn.Module):
    """Depthwise binomial 4x4 filter with stride 2; the padding makes the result half as large, rounded up."""

    def __init__(self):
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = torch.outer(line, line)
        self.kernel: Tensor
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, C, ceil(H / 2), ceil(W / 2)]."""
        rows, columns = (max((-(-side // 2) - 1) * 2 + 4 - side, 0) for side in x.shape[2:])
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, groups=x.shape[1])


class BlurDiscriminator(nn.Module):
    """Convolutions with antialiased halvings, pooled by maximum to 16 x 16 logits.

    Module names are those of the original, which judges images in [0, 1]; so does this one.

    Args:
        base_channels: channels of the first layers, doubled per stage up to 512.
        num_stages: halvings.

    Raises:
        UserError: for sizes below 1 or channels that 32 groups do not divide.
    """

    def __init__(self, *, base_channels: int = 128, num_stages: int = 3):
        super().__init__()
        if base_channels < 1 or num_stages < 1 or base_channels % 32:
            raise UserError("discriminator.base_channels must be a multiple of 32 and num_stages at least 1")
        widths = [base_channels] + [min(base_channels * 2**i, _MOST) for i in range(num_stages)]
        self.block_in = nn.Sequential(nn.Conv2d(3, base_channels, 5, padding=2), nn.LeakyReLU(_SLOPE))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), BlurDownsample(), nn.GroupNorm(32, b), nn.LeakyReLU(_SLOPE))
            for a, b in pairwise(widths)
        )
        self.pool = nn.AdaptiveMaxPool2d((_SIDE, _SIDE))
        self.to_logits = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 1), nn.LeakyReLU(_SLOPE), nn.Conv2d(widths[-1], 1, 5, padding=2)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] [B, 3, H, W] to logits [B, 1, 16, 16]."""
        x = self.block_in((pixels + 1.0) / 2.0)
        for block in self.blocks:
            x = block(x)
        return self.to_logits(self.pool(x))


class LeCam(nn.Module):
    """Regularisation that keeps the two mean logits near each other's running mean (Tseng et al., arXiv 2104.03310).

    The running means are state of the training: they are saved with it, and averaged over processes.

    Args:
        decay: of the running means, which start at 0.
    """

    def __init__(self, *, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.ema_real: Tensor
        self.ema_fake: Tensor
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Penalty of float32 logits of any shape against the running means, which are updated afterwards."""
        real, fake = real.mean(), fake.mean()
        penalty = F.relu(real - self.ema_fake).square() + F.relu(self.ema_real - fake).square()
        self.ema_real.lerp_(_mean_over_processes(real), 1.0 - self.decay)
        self.ema_fake.lerp_(_mean_over_processes(fake), 1.0 - self.decay)
        return penalty


def _mean_over_processes(value: Tensor) -> Tensor:
    value = value.detach().clone()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value
