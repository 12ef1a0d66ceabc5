"""Triton kernels of attention from few queries to a long prefix; called by vgen.layers.short_attention."""

# Compile-time constants are written in capitals, as Triton does.
# ruff: noqa: N803, N806, D417

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["fed", "prefix", "span"])
def attend_prefix(
    query,
    key,
    value,
    bias,
    out,
    peaks,
    sums,
    query_batch,
    query_head,
    query_slot,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    bias_slot,
    fed,
    prefix,
    span,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    SHARED: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    BIASED: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: up to QUERIES queries of SHARED key-value heads of a sample, against a part of the prefix.

    Queries count heads first, then slots. With SHARED > 1 a tile holds ROWS rows of each of the heads, and every query
    is kept to the columns of its own head: queries of several heads fill the rows that the matrix units want.

    Args:
        query: [B, KV_HEADS GROUP, fed, WIDTH]; the numbers named after it are its strides.
        key: [B, KV_HEADS, prefix, WIDTH].
        value: like key.
        bias: [fed, bias_slot] with bias_slot >= prefix, added to the scores; not read unless BIASED.
        out: [B, fed, KV_HEADS GROUP, WIDTH]; with SPLIT float32 [splits, ...], not divided by the sums.
        peaks: with SPLIT float32 [splits, B, fed, KV_HEADS GROUP], largest scores in powers of two; otherwise not used.
        sums: likewise, sums of the weights.
        fed: number of slots.
        prefix: number of rows.
        span: tiles of ROWS rows per split; at least those of the prefix without SPLIT.
        scale: factor of the scores, in powers of two.
        DIM: WIDTH rounded up to what the matrix units take.
        EARLY: wait for the kernel in front (programmatic dependent launch).
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    COLUMNS: tl.constexpr = SHARED * ROWS
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sample = (tl.program_id(0) // (KV_HEADS // SHARED)).to(tl.int64)
    first = (tl.program_id(0) % (KV_HEADS // SHARED)) * SHARED
    entry = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    asked = entry < SHARED * GROUP * fed
    head, slot = entry // fed, entry % fed
    width = tl.arange(0, DIM)
    inside = width < WIDTH

    queries = tl.load(
        query
        + sample * query_batch
        + (first * GROUP + head)[:, None] * query_head
        + slot[:, None] * query_slot
        + width,
        mask=asked[:, None] & inside[None, :],
        other=0.0,
    )
    column = tl.arange(0, COLUMNS)
    place = column % ROWS if SHARED > 1 else column
    keys = key + sample * key_batch + (first + column // ROWS)[:, None] * key_head + width[None, :]
    values = value + sample * value_batch + (first + column // ROWS)[:, None] * value_head + width[None, :]
    biases = bias + slot[:, None] * bias_slot

    # A finite start: a tile that hides everything must not make 0 / 0 of the rescaling.
    peak = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, DIM], tl.float32)
    low = tl.program_id(2) * span
    for step in range(low, tl.minimum(low + span, tl.cdiv(prefix, ROWS))):
        row = step * ROWS + place
        there = row < prefix
        loaded = there[:, None] & inside[None, :]
        tile = tl.load(keys + row[:, None] * key_row, mask=loaded, other=0.0)
        mixture = tl.load(values + row[:, None] * value_row, mask=loaded, other=0.0)
        scores = tl.dot(queries, tl.trans(tile), input_precision="ieee") * scale
        seen = there[None, :]
        if SHARED > 1:
            seen = seen & ((head // GROUP)[:, None] == (column // ROWS)[None, :])
        if BIASED:
            # Up to the end of the line, not of the prefix, so that neighbours are loaded together.
            extra = tl.load(biases + row[None, :], mask=asked[:, None] & (row < bias_slot)[None, :], other=0.0)
            scores += extra.to(tl.float32) * LOG2_E
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(mixture.dtype), mixture, mixed * shrink[:, None], input_precision="ieee")
        peak = higher

    line = (sample * fed + slot) * HEADS + first * GROUP + head
    if SPLIT:
        line += tl.program_id(2).to(tl.int64) * (tl.num_programs(0) // (KV_HEADS // SHARED)) * fed * HEADS
        tl.store(peaks + line, peak, mask=asked)
        tl.store(sums + line, total, mask=asked)
    else:
        # Nothing seen gives zeros.
        mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    kept = asked[:, None] & inside[None, :]
    tl.store(out + line[:, None] * WIDTH + width[None, :], mixed.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["lines", "splits"])
def combine_splits(
    parts,
    peaks,
    sums,
    out,
    lines,
    splits,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    LINES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Put the results of the splits together, in their order.

    Args:
        parts: float32 [splits, lines, WIDTH].
        peaks: float32 [splits, lines].
        sums: float32 [splits, lines].
        out: [lines, WIDTH].
        lines: number of lines, B times slots times heads.
        splits: number of splits.
        EARLY: wait for the kernel in front (programmatic dependent launch).
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    width = tl.arange(0, DIM)
    there = line < lines
    kept = there[:, None] & (width < WIDTH)[None, :]
    peak = tl.full([LINES], -1e30, tl.float32)
    total = tl.zeros([LINES], tl.float32)
    mixed = tl.zeros([LINES, DIM], tl.float32)
    for split in range(splits):
        at = split * lines + line
        part = tl.load(parts + at[:, None] * WIDTH + width[None, :], mask=kept, other=0.0)
        other = tl.load(peaks + at, mask=there, other=-1e30)
        amount = tl.load(sums + at, mask=there, other=0.0)
        higher = tl.maximum(peak, other)
        shrink, share = tl.exp2(peak - higher), tl.exp2(other - higher)
        total = total * shrink + amount * share
        mixed = mixed * shrink[:, None] + part * share[:, None]
        peak = higher
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + line[:, None] * WIDTH + width[None, :], mixed.to(out.dtype.element_ty), mask=kept)
