"""Triton kernels of group normalisation on channels-last maps, held as rows [samples * positions, channels].

Channels and groups are powers of two. All sums are float32, in an order that knows nothing of the batch.
"""

# Compile-time constants are written in capitals, as Triton does.
# ruff: noqa: N803

import triton
import triton.language as tl


@triton.jit
def sum_groups(
    x,
    bias,
    sums,
    positions,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Sums and sums of squares of x + bias by group, float32 [B, chunks, 2, GROUPS].

    A program takes a sample and a chunk of STEPS * ROWS positions.
    """
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, channels = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    x += sample * positions * CHANNELS
    offset = tl.zeros([CHANNELS], tl.float32)
    if BIASED:
        offset = tl.load(bias + channels).to(tl.float32)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    squares = tl.zeros([ROWS, CHANNELS], tl.float32)
    for step in range(STEPS):
        row = (chunk * STEPS + step) * ROWS + rows
        inside = row[:, None] < positions
        value = tl.load(x + row[:, None] * CHANNELS + channels, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value + offset, 0.0)
        total += value
        squares += value * value
    width: tl.constexpr = CHANNELS // GROUPS
    total = tl.sum(tl.reshape(tl.sum(total, axis=0), [GROUPS, width]), axis=1)
    squares = tl.sum(tl.reshape(tl.sum(squares, axis=0), [GROUPS, width]), axis=1)
    sums += (sample * tl.num_programs(1) + chunk) * 2 * GROUPS
    groups = tl.arange(0, GROUPS)
    tl.store(sums + groups, total)
    tl.store(sums + GROUPS + groups, squares)


@triton.jit
def make_scales(
    sums,
    weight,
    shift,
    bias,
    scales,
    chunks,
    positions,
    eps,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Factor and summand of every channel, float32 [B, 2, CHANNELS]; one program per sample."""
    sample = tl.program_id(0).to(tl.int64)
    groups, channels, parts = tl.arange(0, GROUPS), tl.arange(0, CHANNELS), tl.arange(0, CHUNKS)
    place = sums + (sample * chunks + parts)[:, None] * 2 * GROUPS + groups
    there = (parts < chunks)[:, None]
    width: tl.constexpr = CHANNELS // GROUPS
    count = positions * 1.0 * width
    mean = tl.sum(tl.load(place, mask=there, other=0.0), axis=0) / count
    square = tl.sum(tl.load(place + GROUPS, mask=there, other=0.0), axis=0) / count
    spread = tl.rsqrt(tl.maximum(square - mean * mean, 0.0) + eps)
    mean = tl.reshape(tl.broadcast_to(mean[:, None], [GROUPS, width]), [CHANNELS])
    spread = tl.reshape(tl.broadcast_to(spread[:, None], [GROUPS, width]), [CHANNELS])
    factor = spread * tl.load(weight + channels).to(tl.float32)
    if BIASED:
        mean -= tl.load(bias + channels).to(tl.float32)
    scales += sample * 2 * CHANNELS
    tl.store(scales + channels, factor)
    tl.store(scales + CHANNELS + channels, tl.load(shift + channels).to(tl.float32) - mean * factor)


@triton.jit
def apply_scales(
    x,
    scales,
    out,
    positions,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SWISH: tl.constexpr,
):
    """Normalised rows, through SiLU if asked; one program per sample and TILES * ROWS positions."""
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, channels = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    factor = tl.load(scales + sample * 2 * CHANNELS + channels)
    summand = tl.load(scales + sample * 2 * CHANNELS + CHANNELS + channels)
    x += sample * positions * CHANNELS
    out += sample * positions * CHANNELS
    for tile in range(TILES):
        row = (part * TILES + tile) * ROWS + rows
        inside = row[:, None] < positions
        place = row[:, None] * CHANNELS + channels
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * factor + summand
        if SWISH:
            value = value / (1.0 + tl.exp(-value))
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_biased(branch, x, bias, count, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum branch + x + bias into branch, over all numbers of channels-last maps."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(branch + place, mask=inside).to(tl.float32) + tl.load(x + place, mask=inside).to(tl.float32)
    value += tl.load(bias + place % CHANNELS).to(tl.float32)
    tl.store(branch + place, value.to(branch.dtype.element_ty), mask=inside)
