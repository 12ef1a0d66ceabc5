"""Triton kernel for the random numbers of a decoding; called by vgen.sampling.noise."""

# Compile-time constants are written in capitals, as Triton does.
# ruff: noqa: N803, D417

import triton
import triton.language as tl

MASK = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _mix(x):
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


@triton.jit
def _with_key(high, low, key):
    high = _mix((high + (key & MASK) + 0x9E3779B9) & MASK)
    low = _mix(((low ^ high) + (key >> 32)) & MASK)
    return _mix((high + low * 0x9E3779B1) & MASK), low


@triton.jit(do_not_specialize=["count", "order_sample"])
def number_places(seed, samples, order, out, count, order_sample, COLUMNS: tl.constexpr):
    """What :func:`vgen.random.keyed_uniform` gives for (seed, sample, place), and a column of zeros behind.

    Args:
        seed: int64 [1].
        samples: int64 [B].
        order: int64 [count], or [B, count] with order_sample as its stride, the places.
        out: float64 [B, count + 1]; a program writes COLUMNS numbers of a row.
    """
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.load(order + sample * order_sample + column, mask=column < count, other=0)
    high = tl.full([COLUMNS], 0x243F6A88, tl.int64)
    low = tl.full([COLUMNS], 0x85A308D3, tl.int64)
    high, low = _with_key(high, low, tl.load(seed))
    high, low = _with_key(high, low, tl.load(samples + sample))
    high, low = _with_key(high, low, place)
    number = (high * 65536 + (low >> 16)).to(tl.float64) / 281474976710656.0
    tl.store(out + sample * (count + 1) + column, tl.where(column < count, number, 0.0), mask=column <= count)
