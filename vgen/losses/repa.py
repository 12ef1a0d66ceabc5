"""Representation alignment (REPA, Yu et al., arXiv 2410.06940): early decoder features that predict those of DINOv2."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import UserError

_KINDS = ("dinov2", "dinov2_with_registers")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class REPALoss(nn.Module):
    """Negative cosine similarity between projected decoder patches and the patches of a frozen DINOv2.

    Only the projector is part of the module: the DINOv2 enters neither checkpoints nor optimizers.

    Args:
        dim: width of the decoder.
        path: folder of a DINOv2 in the layout of Hugging Face (config.json, model.safetensors), such as a download of
            facebook/dinov2-large; nothing is ever downloaded.
        block: index of the decoder block whose patches are aligned, from 0 (FlexTok: 1).
        weight: of the loss.
        image_size: side in pixels to which pictures are resized for the DINOv2; 224 gives 16 x 16 patches.
        hidden: width of the projector's two hidden layers.

    Raises:
        UserError: if the folder or the library that reads it is missing.
    """

    def __init__(
        self,
        *,
        dim: int,
        path: str | None,
        block: int = 1,
        weight: float = 1.0,
        image_size: int = 224,
        hidden: int = 2048,
    ) -> None:
        super().__init__()
        self.block, self.weight, self.image_size = block, weight, image_size
        target = _load_dinov2(path)
        self._frozen = [target]
        self._skipped = 1 + getattr(target.config, "num_register_tokens", 0)
        if image_size % target.config.patch_size:
            raise UserError(f"repa.image_size={image_size} must be a multiple of {target.config.patch_size}, its patch")
        layers: list[nn.Module] = [nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
        self.projector = nn.Sequential(*layers, nn.Linear(hidden, target.config.hidden_size))

    @torch.no_grad()
    def targets(self, pixels: Tensor) -> Tensor:
        """Features float32 [B, D, g, g] of pixels in [-1, 1] [B, 3, H, W]."""
        target = self._frozen[0].to(pixels.device)
        pictures = F.interpolate((pixels.float() + 1) / 2, size=(self.image_size,) * 2, mode="bicubic", antialias=True)
        mean, std = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
        tokens = target(pixel_values=(pictures.clamp(0, 1) - mean) / std).last_hidden_state[:, self._skipped :]
        side = self.image_size // target.config.patch_size
        return tokens.float().transpose(1, 2).unflatten(2, (side, side))

    def forward(self, pixels: Tensor, features: Tensor) -> Tensor:
        """Mean negative cosine similarity, unweighted, in [-1, 1].

        Args:
            pixels: in [-1, 1], [B, 3, H, W].
            features: patches of the decoder [B, rows, columns, dim].
        """
        wanted = self.targets(pixels)
        got = self.projector(features).permute(0, 3, 1, 2).float()
        if got.shape[2:] != wanted.shape[2:]:
            got = F.interpolate(got, size=wanted.shape[2:], mode="bilinear")
        return -F.cosine_similarity(got, wanted, dim=1).mean()


def _load_dinov2(path: str | None) -> Any:
    config = None if path is None else Path(path).expanduser() / "config.json"
    if config is None or not config.is_file():
        raise UserError(
            f"repa.path={path} holds no DINOv2: a folder with config.json and model.safetensors is needed, such as a "
            "download of facebook/dinov2-large; or train without the REPA loss: task.repa.weight=0"
        )
    try:
        kind = json.loads(config.read_text()).get("model_type")
    except ValueError as error:
        raise UserError(f"{config} is not readable JSON; copy the folder again") from error
    if kind not in _KINDS:
        raise UserError(f"{config} describes a {kind}, not one of {', '.join(_KINDS)}")
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise UserError("the REPA loss reads DINOv2 with transformers: pip install 'vgen[repa]'") from error
    try:
        model = AutoModel.from_pretrained(config.parent, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"repa.path={path} cannot be loaded ({str(error).splitlines()[0]}); copy it again") from error
    return model.eval().requires_grad_(False)
