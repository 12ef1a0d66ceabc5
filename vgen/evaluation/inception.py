"""The Inception network of the FID literature (TensorFlow, 2015-12-05) on torch-fidelity's layers, with sFID's tap."""

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from vgen.errors import UserError
from vgen.evaluation.resize import resize_pictures

POOL_DIM = 2048
CLASSES = 1008
SPATIAL_CHANNELS = 7
SPATIAL_DIM = SPATIAL_CHANNELS * 17 * 17


class Inception(FeatureExtractorInceptionV3):
    """Inception-v3 as patched for FID, in float32.

    Its layers are torch-fidelity's; the forward pass is written out here because neither the spatial features of sFID
    nor another resize can be had from theirs.
    """

    def __init__(self, state: Mapping[str, Tensor] | None, *, resize_mode: str = "tf1_bilinear"):
        """Build the network.

        Args:
            state: published state dict; ``num_batches_tracked`` may be missing. None leaves random weights, for
                measurements of speed.
            resize_mode: one of :data:`vgen.evaluation.resize.RESIZE_MODES`.

        Raises:
            UserError: if the state dict is not that of this network.
        """
        buffer = io.BytesIO()  # torch-fidelity takes weights as a file only, and downloads them when given none
        torch.save(dict(state or {}), buffer)
        buffer.seek(0)
        self._keep_random = state is None
        try:
            super().__init__("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer)
        except RuntimeError as error:
            raise UserError(
                f"the weights are not those of the Inception network of FID ({' '.join(str(error).split())[:200]})"
            ) from error
        self.resize_mode = resize_mode

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, but for those that a network of random weights is asked to read when it is made."""
        return None if self._keep_random else super().load_state_dict(state_dict, strict, assign)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of pictures uint8 [B, 3, H, W].

        Returns:
            float32 pool [B, 2048], logits without bias [B, 1008] (of which the Inception score is made), and the
            spatial features of sFID [B, 2023]: the first 7 channels of the first branch of Mixed_6d, in H, W, C order
            (TensorFlow's ``mixed_6/conv:0``).
        """
        taps = self.taps(x)
        return taps["2048"], taps["logits_unbiased"], taps["spatial"]

    def taps(self, pictures: Tensor) -> dict[str, Tensor]:
        """All features of torch-fidelity's extractor by its names, and ``spatial``."""
        x = (resize_pictures(pictures, self.INPUT_IMAGE_SIZE, self.resize_mode) - 128) / 128
        x = self.MaxPool_1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        taps = {"64": _average(x)}
        x = self.MaxPool_2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        taps["192"] = _average(x)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c):
            x = block(x)
        taps["spatial"] = spatial_features(self.Mixed_6d.branch1x1(x))
        x = self.Mixed_6e(self.Mixed_6d(x))
        taps["768"] = _average(x)
        x = _average(self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))))
        taps["2048"] = x
        taps["logits_unbiased"] = x @ self.fc.weight.T
        taps["logits"] = taps["logits_unbiased"] + self.fc.bias
        return taps


def _average(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def spatial_features(maps: Tensor) -> Tensor:
    """Spatial features of sFID: the first 7 channels of maps [B, C, H, W] as [B, H * W * 7], channel fastest.

    The order is that of the published reference statistics; C, H, W order gives another, wrong score.
    """
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
