"""Guidance, temperature and draw of a pass in two kernels, which read the logits once.

The definition is that of :func:`vgen.sampling.filters.pick_tokens` on guided logits: the first token whose cumulative
probability exceeds a uniform number. Exponentials are float32, all sums float64 in a fixed order that knows nothing of
the batch; only a number within about 1e-7 of a boundary can give the token beside it.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from vgen.layers.early_launch import early_launch
from vgen.layers.interpreter import interpreted

_CHUNK, _CHUNKS = 128, 16  # logits per chunk, chunks per program


def draws_here(logits: Tensor) -> bool:
    """Whether :func:`draw_tokens` can take these logits: CUDA and the package triton."""
    return (logits.is_cuda or interpreted()) and _kernels() is not None


def draw_tokens(
    logits: Tensor,
    uniform: Tensor,
    targets: Tensor,
    *,
    weight: float = 1.0,
    temperature: float = 1.0,
    copies: Tensor | None = None,
) -> Tensor:
    """Draw one token per target.

    Args:
        logits: float [B, D, V], or [2 B, D, V] with the unconditional branch behind the conditional one.
        uniform: float64 [B, n] in [0, 1), by order index.
        targets: int64 [B, D], order indices.
        weight: w of uncond + w (cond - uncond), in float32; 1 = the conditional branch alone.
        temperature: divides the guided logits, bounded below by 1e-5.
        copies: int64 [branches, B, n], into which the token of target t is written at column t; None = nowhere.

    Returns:
        int64 [B, D]; a token of zero probability is never drawn.
    """
    kernels = _kernels()
    assert kernels is not None, "draw_tokens needs the package triton"
    batch, decided = targets.shape
    assert len(logits) in (batch, 2 * batch), "one or two branches"
    lines, size = batch * decided, logits.shape[-1]
    logits = logits.contiguous()
    tiles = -(-size // (_CHUNK * _CHUNKS))
    peaks = torch.empty(lines, tiles, dtype=torch.float32, device=logits.device)
    sums = torch.empty(lines, tiles * _CHUNKS, dtype=torch.float64, device=logits.device)
    tokens = torch.empty(batch, decided, dtype=torch.int64, device=logits.device)
    # Whole numbers would be compiled in.
    weight, temperature = float(weight), max(float(temperature), 1e-5)
    same = {
        "V": size,
        "CHUNK": _CHUNK,
        "CHUNKS": _CHUNKS,
        "GUIDED": weight != 1.0 and len(logits) == 2 * batch,
        "HEATED": temperature != 1.0,
        "num_warps": 4,
        **early_launch(logits.device),
    }
    if copies is not None:
        assert copies.stride(2) == 1
    # Triton launches on the current device.
    with torch.cuda.device_of(logits):
        kernels.weigh_chunks[(lines, tiles)](logits, peaks, sums, lines, weight, temperature, **same)
        kernels.pick_in_chunks[(lines,)](
            logits,
            peaks,
            sums,
            uniform,
            targets,
            tokens,
            tokens if copies is None else copies,
            lines,
            decided,
            uniform.stride(0),
            *targets.stride(),
            *((0, 0) if copies is None else copies.stride()[:2]),
            weight,
            temperature,
            TILES=tiles,
            ALL=1 << (tiles * _CHUNKS - 1).bit_length(),
            BRANCHES=0 if copies is None else len(copies),
            **same,
        )
    return tokens


@cache
def _kernels() -> Any:
    """The kernels, or None without the package triton, which PyTorch brings along on Linux only."""
    try:
        from vgen.sampling import draw_kernels
    except ImportError:
        return None
    return draw_kernels
