"""First stage of the two-stage TiTok: predict the codes that a frozen tokenizer gives the same picture."""

from typing import Any

import torch
from torch import Tensor

from vgen.evaluation.pixel_metrics import psnr
from vgen.losses.tokens import token_accuracy, token_cross_entropy
from vgen.pixels import to_uint8
from vgen.tokenizers.base import Tokenizer
from vgen.tokenizers.titok import ProxyPrediction, TiTok
from vgen.training.codebook_module import CodebookModule


class ProxyModule(CodebookModule):
    """Cross entropy of the teacher's codes plus the quantizer's terms (arXiv 2406.07550, section 3.3); no pixel loss.

    The tokenizer already holds the teacher's decoder and codebook, so that its pictures can be looked at and the second
    stage can start from its release; they are not trained here.

    Args:
        teacher: frozen tokenizer on the grid that the TiTok paints. It is kept out of the module tree, so it is neither
            saved nor wrapped.
        quantizer_weight: weight of the sum of the quantizer's terms.
        shared: arguments of :class:`vgen.training.codebook_module.CodebookModule`.
    """

    def __init__(self, *, teacher: Tokenizer, quantizer_weight: float, **shared: Any) -> None:
        super().__init__(train_only=("encoder.", "latent_tokens", "quantize.", "decoder."), **shared)
        self.quantizer_weight = quantizer_weight
        self._teacher = [teacher.eval().requires_grad_(False)]

    def on_fit_start(self) -> None:
        """Move the teacher, which Lightning does not see."""
        super().on_fit_start()
        self._teacher[0].to(self.device)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One pass; the optimizer steps after ``accumulate`` batches."""
        last = self.completes_step()
        total, logs, prediction = self._objective(batch["pixels"])
        self.manual_backward(total / self.accumulate)
        self.record(loss=total, **logs)
        self.count_codes(prediction.ids)
        if last:
            self.step_network()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The objective and its terms, accuracy, PSNR of the 8-bit pictures and code use on held-out images."""
        pixels = batch["pixels"]
        total, logs, prediction = self._objective(pixels)
        quality = psnr(to_uint8(self.tokenizer.reconstruct(pixels)), to_uint8(pixels)).mean()
        self.sum_validation(len(pixels), loss=total, psnr=quality, **logs)
        self.count_codes(prediction.ids)

    def _objective(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor], ProxyPrediction]:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            codes = self._teacher[0].encode(pixels)
        assert isinstance(self.network, TiTok)
        prediction = self.network.predict(pixels)
        logits = prediction.logits.float().flatten(2).transpose(1, 2)
        logs = {"proxy": token_cross_entropy(logits, codes), **prediction.losses}
        total = logs["proxy"] + self.quantizer_weight * sum(prediction.losses.values())
        return total, logs | {"accuracy": token_accuracy(logits, codes)}, prediction
