"""How token ids become pixels while sampling: precision, memory layout and compilation of the tokenizer's decoder."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.tokenizers.base import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PixelSettings:
    """Options of the tokenizer's decoder; the defaults are the published way.

    Attributes:
        dtype: ``float32``, or ``bfloat16`` for its products and convolutions (autocast).
        channels_last: convolutions on channels-last memory.
        compile: torch.compile of the decoder, once per batch size.
    """

    dtype: str = "float32"
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: for an unknown dtype.
        """
        if self.dtype not in DTYPES:
            raise UserError(f"pixels.dtype={self.dtype} is unknown; choose one of {', '.join(DTYPES)}")


class PixelDecoder:
    """A tokenizer's decoder with its options applied.

    Args:
        tokenizer: on the device to decode on; its memory layout is changed where the settings say so.
        settings: options.
    """

    def __init__(self, tokenizer: Tokenizer, settings: PixelSettings) -> None:
        self.settings = settings
        if settings.channels_last:
            for parameter in tokenizer.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        decode = tokenizer.decode_samples
        self._decode = torch.compile(decode, dynamic=False) if settings.compile else decode

    @torch.inference_mode()
    def __call__(self, ids: Tensor, sample_index: Tensor, seed: int, text: Tensor | None = None) -> Tensor:
        """Tokens of samples int64 [B] to float32 pixels as the tokenizer decodes them, contiguous.

        Arguments as in :meth:`vgen.tokenizers.base.Tokenizer.decode_samples`.
        """
        dtype = DTYPES[self.settings.dtype]
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            told = () if text is None else (text,)
            return self._decode(ids, sample_index, seed, *told).float().contiguous()
