"""Triton kernels of attention from few queries to a long prefix; called by vgen.layers.short_attention."""

# Compile-time constants are written in capitals, as Triton does.
# ruff: noqa: N803, N806, D417, RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from vgen.layers.interpreter import interpreted

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _widened(tile, dtype: tl.constexpr):
    """A tile of keys or values in the dtype of the products."""
    wide = tile.to(dtype)
    if tile.dtype.primitive_bitwidth == 8 and not INTERPRETED:
        # Made here and in this layout: otherwise the compiler first brings the bytes into that of the matrix units, for
        # which values are fetched one by one.
        wide = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [wide], dtype=wide.dtype, is_pure=False, pack=2)
    return wide


@triton.jit
def _scores(queries, keys, seen, biases, row, end, asked, scale, BIASED: tl.constexpr):
    """Scores of a tile of keys in powers of two, -inf where not ``seen``."""
    scores = tl.dot(queries, tl.trans(_widened(keys, queries.dtype)), input_precision="ieee") * scale
    if BIASED:
        extra = tl.load(biases + row[None, :], mask=asked[:, None] & (row < end)[None, :], other=0.0)
        scores += extra.to(tl.float32) * LOG2_E
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _added(scores, values, peak, total, mixed, dtype: tl.constexpr):
    """Peak, sum of weights and mixture of values with one more tile of scores."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(peak - higher)
    total = total * shrink + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(dtype), _widened(values, dtype), mixed * shrink[:, None], input_precision="ieee")
    return higher, total, mixed


@triton.jit(do_not_specialize=["fed", "prefix", "settled", "span"])
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
    bias_batch,
    bias_slot,
    fed,
    prefix,
    settled,
    span,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    SHARED: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    HELD: tl.constexpr,
    FRESH: tl.constexpr,
    BIASED: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: up to QUERIES queries of SHARED key-value heads of a sample, against a part of the prefix.

    Queries count heads first, then slots. With SHARED > 1 a tile holds ROWS rows of each of the heads, and every query
    is kept to the columns of its own head: queries of several heads fill the rows that the matrix units want.

    With HELD > 0 the first tiles of the rows that earlier passes wrote are asked for before the kernel in front is
    waited for, and the first tile of those after them with the queries, so that nothing but the queries is waited for.

    Args:
        query: [B, KV_HEADS GROUP, fed, WIDTH]; the numbers named after it are its strides.
        key: [B, KV_HEADS, prefix, WIDTH], of the same dtype or of one byte per number.
        value: like key.
        bias: [fed, bias_slot] with bias_slot >= prefix, added to the scores, bias_batch numbers on for every sample, 0
            where they share it; not read unless BIASED.
        out: [B, fed, KV_HEADS GROUP, WIDTH]; with SPLIT float32 [splits, ...], not divided by the sums.
        peaks: with SPLIT float32 [splits, B, fed, KV_HEADS GROUP], largest scores in powers of two; otherwise not used.
        sums: likewise, sums of the weights.
        fed: number of slots.
        prefix: number of rows.
        settled: rows in front that are cut into tiles of ROWS; the others into tiles of FRESH, all in the last split.
        span: tiles of ROWS rows per split; at least those of the settled rows without SPLIT.
        scale: factor of the scores, in powers of two.
        DIM: WIDTH rounded up to what the matrix units take.
        EARLY: wait for the kernel in front (programmatic dependent launch).
    """
    # Two numbers of one byte become float16 in one instruction, bfloat16 in three.
    BYTES: tl.constexpr = key.dtype.element_ty.primitive_bitwidth == 8
    dtype: tl.constexpr = tl.float16 if BYTES and query.dtype.element_ty == tl.bfloat16 else query.dtype.element_ty
    HEADS: tl.constexpr = KV_HEADS * GROUP
    COLUMNS: tl.constexpr = SHARED * ROWS
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        if HELD == 0:
            tl.extra.cuda.gdc_wait()
    sample = (tl.program_id(0) // (KV_HEADS // SHARED)).to(tl.int64)
    first = (tl.program_id(0) % (KV_HEADS // SHARED)) * SHARED
    entry = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    asked = entry < SHARED * GROUP * fed
    head, slot = entry // fed, entry % fed
    width = tl.arange(0, DIM)
    inside = width < WIDTH
    column = tl.arange(0, COLUMNS)
    place = column % ROWS if SHARED > 1 else column
    keys = key + sample * key_batch + (first + column // ROWS)[:, None] * key_head + width[None, :]
    values = value + sample * value_batch + (first + column // ROWS)[:, None] * value_head + width[None, :]
    biases = bias + sample * bias_batch + slot[:, None] * bias_slot
    low = tl.program_id(2) * span

    held, mixtures = (), ()
    for number in tl.static_range(HELD):
        row = (low + number) * ROWS + place
        loaded = (row < settled)[:, None] & inside[None, :]
        held = held + (tl.load(keys + row[:, None] * key_row, mask=loaded, other=0.0),)
        mixtures = mixtures + (tl.load(values + row[:, None] * value_row, mask=loaded, other=0.0),)
    if EARLY and HELD > 0:
        tl.extra.cuda.gdc_wait()
    queries = tl.load(
        query
        + sample * query_batch
        + (first * GROUP + head)[:, None] * query_head
        + slot[:, None] * query_slot
        + width,
        mask=asked[:, None] & inside[None, :],
        other=0.0,
    ).to(dtype)

    # A finite start: a tile that hides everything must not make 0 / 0 of the rescaling.
    peak = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, DIM], tl.float32)
    if HELD > 0:
        # The rows of a pass come after those of earlier ones, so this is mostly all of them.
        end = tl.where(tl.program_id(2) == tl.num_programs(2) - 1, prefix, settled)
        last_keys = key + sample * key_batch + first * key_head + width[None, :]
        last_values = value + sample * value_batch + first * value_head + width[None, :]
        new = settled + tl.arange(0, FRESH)
        here = (new < end)[:, None] & inside[None, :]
        new_keys = tl.load(last_keys + new[:, None] * key_row, mask=here, other=0.0)
        new_values = tl.load(last_values + new[:, None] * value_row, mask=here, other=0.0)
        # One maximum and one sum for all tiles that are here.
        found = ()
        highest = tl.full([QUERIES, COLUMNS], float("-inf"), tl.float32)
        for number in tl.static_range(HELD):
            row = (low + number) * ROWS + place
            scores = _scores(
                queries, held[number], (row < settled)[None, :], biases, row, settled, asked, scale, BIASED
            )
            highest = tl.maximum(highest, scores)
            found = found + (scores,)
        new_scores = _scores(queries, new_keys, (new < end)[None, :], biases, new, end, asked, scale, BIASED)
        peak = tl.maximum(peak, tl.maximum(tl.max(highest, 1), tl.max(new_scores, 1)))
        new_weights = tl.exp2(new_scores - peak[:, None])
        mixed = tl.dot(new_weights.to(dtype), _widened(new_values, dtype), mixed, input_precision="ieee")
        together = tl.zeros([QUERIES, COLUMNS], tl.float32)
        for number in tl.static_range(HELD):
            weights = tl.exp2(found[number] - peak[:, None])
            together += weights
            mixed = tl.dot(weights.to(dtype), _widened(mixtures[number], dtype), mixed, input_precision="ieee")
        total = tl.sum(together, 1) + tl.sum(new_weights, 1)
        for start in range(settled + FRESH, end, FRESH):
            new = start + tl.arange(0, FRESH)
            here = (new < end)[:, None] & inside[None, :]
            new_keys = tl.load(last_keys + new[:, None] * key_row, mask=here, other=0.0)
            new_values = tl.load(last_values + new[:, None] * value_row, mask=here, other=0.0)
            new_scores = _scores(queries, new_keys, (new < end)[None, :], biases, new, end, asked, scale, BIASED)
            peak, total, mixed = _added(new_scores, new_values, peak, total, mixed, dtype)
    for step in range(low + HELD, tl.minimum(low + span, tl.cdiv(settled, ROWS))):
        row = step * ROWS + place
        seen = (row < settled)[None, :]
        loaded = (row < settled)[:, None] & inside[None, :]
        tile = tl.load(keys + row[:, None] * key_row, mask=loaded, other=0.0)
        mixture = tl.load(values + row[:, None] * value_row, mask=loaded, other=0.0)
        if SHARED > 1:
            seen = seen & ((head // GROUP)[:, None] == (column // ROWS)[None, :])
        # The bias up to the end of its line, not of the rows, so that neighbours are loaded together.
        scores = _scores(queries, tile, seen, biases, row, bias_slot, asked, scale, BIASED)
        peak, total, mixed = _added(scores, mixture, peak, total, mixed, dtype)

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
