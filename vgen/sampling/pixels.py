"""How token ids become pixels while sampling: precision, memory layout and compilation of the tokenizer's decoder."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.tokenizers.base import Tokenizer
from vgen.tokenizers.norm_swish import GroupNorm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PixelSettings:
    """Options of the tokenizer's decoder; the defaults are the published way.

    Attributes:
        dtype: ``float32``, or ``bfloat16`` for its products and convolutions; a convolutional decoder of the VQ-GAN
            family is held in it as a whole, the others run under autocast.
        channels_last: convolutions on channels-last memory; on a GPU with triton, the normalisations of a VQ-GAN
            decoder then are kernels of their own, see :mod:`vgen.tokenizers.norm_swish`.
        compile: torch.compile of the decoder, for the size of the first batch; smaller ones are filled up to it.
        beside_tokens: on a GPU, beside the tokens of the next batch; otherwise in front of them.
    """

    dtype: str = "float32"
    channels_last: bool = False
    compile: bool = False
    beside_tokens: bool = True

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: for an unknown dtype, or a switch that is neither true nor false.
        """
        if self.dtype not in DTYPES:
            raise UserError(f"pixels.dtype={self.dtype} is unknown; choose one of {', '.join(DTYPES)}")
        for name in ("channels_last", "compile", "beside_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"pixels.{name}={getattr(self, name)} is unknown; choose true or false")


class PixelDecoder:
    """A tokenizer's decoder with its options applied.

    Args:
        tokenizer: on the device to decode on; the memory layout of its weights and the dtype of those that only decode
            are changed where the settings say so.
        settings: options.
    """

    def __init__(self, tokenizer: Tokenizer, settings: PixelSettings) -> None:
        self.settings = settings
        dtype = DTYPES[settings.dtype]
        self._autocast = dtype != torch.float32 and not tokenizer.hold_decoder(dtype)
        if settings.channels_last:
            for parameter in tokenizer.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
            for module in tokenizer.modules():
                if isinstance(module, GroupNorm):
                    module.fused = True
        decode = tokenizer.decode_samples
        self._decode = torch.compile(decode, dynamic=False) if settings.compile else decode
        self._compiled_for = 0

    @torch.inference_mode()
    def __call__(self, ids: Tensor, sample_index: Tensor, seed: int, text: Tensor | None = None) -> Tensor:
        """Tokens of samples int64 [B] to float32 pixels as the tokenizer decodes them, contiguous.

        Arguments as in :meth:`vgen.tokenizers.base.Tokenizer.decode_samples`.
        """
        count = len(ids)
        if self.settings.compile:
            self._compiled_for = max(self._compiled_for, count)
            ids, sample_index = (_filled(tensor, self._compiled_for) for tensor in (ids, sample_index))
            text = None if text is None else _filled(text, self._compiled_for)
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            told = () if text is None else (text,)
            return self._decode(ids, sample_index, seed, *told)[:count].float().contiguous()

    def forget(self) -> None:
        """Compile for the next batch if it is smaller than those so far, which did not fit."""
        self._compiled_for = 0


def _filled(tensor: Tensor, count: int) -> Tensor:
    """Its last row repeated until there are ``count``; always new, since compiled code is one for inference tensors."""
    return tensor[torch.arange(count, device=tensor.device).clamp(max=len(tensor) - 1)]
