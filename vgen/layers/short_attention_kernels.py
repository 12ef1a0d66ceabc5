"""Triton kernels of attention from few queries to a long prefix; called by vgen.layers.short_attention."""

# Compile-time constants are written in capitals, as Triton does.
# ruff: noqa: N803, N806, D417, RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from vgen.layers.interpreter import interpreted
from vgen.layers.many_row_kernels import follow, let_follow, wait
from vgen.layers.matrix_product_kernels import ask_before, keep_here, sum_of_parts

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(interpreted())
# A finite start: a tile that hides everything must not make 0 / 0 of the rescaling.
LOWEST = tl.constexpr(-1e30)


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
def _scores(products, seen, extra, scale, BIASED: tl.constexpr):
    """Scores in powers of two of products of queries and keys, -inf where not ``seen``.

    ``extra`` is read if ``BIASED``.
    """
    scores = products * scale
    if BIASED:
        scores += extra.to(tl.float32) * LOG2_E
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _joined(peak, total, other_peak, other_total):
    """Peak and sum of weights of two parts."""
    higher = tl.maximum(peak, other_peak)
    return higher, total * tl.exp2(peak - higher) + other_total * tl.exp2(other_peak - higher)


@triton.jit
def _attend_held(
    query,
    key,
    value,
    biases,
    key_row,
    value_row,
    bias_slot,
    start,
    settled,
    end,
    asked,
    scale,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    HELD: tl.constexpr,
    WAY_ROWS: tl.constexpr,
    BIASED: tl.constexpr,
    EARLY: tl.constexpr,
    dtype: tl.constexpr,
):
    """Peak, sum of weights and mixture of values over HELD tiles of settled rows and the first tile of the others.

    A tile is dealt out to ways of WAY_ROWS rows, one for each warp: each has a softmax of its own, so that warps wait
    for each other only to put theirs together.

    Args:
        query: pointers [QUERIES, 1] to the queries; biases likewise.
        start: the first row held; the others are those from ``settled`` to ``end``.
    """
    WAYS: tl.constexpr = ROWS // WAY_ROWS
    width = tl.arange(0, DIM)[None, None, :]
    inside = width < WIDTH
    place = tl.arange(0, WAYS)[:, None] * WAY_ROWS + tl.arange(0, WAY_ROWS)[None, :]
    held, mixtures = (), ()
    for number in tl.static_range(HELD):
        row = start + number * ROWS + place
        loaded = (row < settled)[:, :, None] & inside
        keys = tl.load(key + row[:, :, None] * key_row + width, mask=loaded, other=0.0)
        values = tl.load(value + row[:, :, None] * value_row + width, mask=loaded, other=0.0)
        held, mixtures = held + (_widened(keys, dtype),), mixtures + (_widened(values, dtype),)
    wait(EARLY)
    # Every warp has the queries.
    each = query[None, :, :] + width + tl.zeros([WAYS, 1, 1], tl.int32)
    queries = tl.load(each, mask=asked[None, :, None] & inside, other=0.0)
    new = settled + place
    loaded = (new < end)[:, :, None] & inside
    new_keys = tl.load(key + new[:, :, None] * key_row + width, mask=loaded, other=0.0)
    new_values = tl.load(value + new[:, :, None] * value_row + width, mask=loaded, other=0.0)
    extras = ()
    if BIASED:
        for number in tl.static_range(HELD + 1):
            row = new if number == HELD else start + number * ROWS + place
            there = asked[None, :, None] & (row < bias_slot)[:, None, :]
            extras += (tl.load(biases[None, :, :] + row[:, None, :], mask=there, other=0.0),)
    ask_before()
    queries = keep_here(queries).to(dtype)
    held += (_widened(keep_here(new_keys), dtype),)
    mixtures += (_widened(keep_here(new_values), dtype),)

    # One maximum and one sum for all tiles.
    found = ()
    highest = tl.full([WAYS, QUERIES, WAY_ROWS], LOWEST, tl.float32)
    for number in tl.static_range(HELD + 1):
        row = new if number == HELD else start + number * ROWS + place
        seen = row < (end if number == HELD else settled)
        products = tl.dot(queries, tl.permute(held[number], (0, 2, 1)), input_precision="ieee")
        extra = keep_here(extras[number]) if BIASED else products
        scores = _scores(products, seen[:, None, :], extra, scale, BIASED)
        highest = tl.maximum(highest, scores)
        found = found + (scores,)
    peak = tl.max(highest, 2)
    together = tl.zeros([WAYS, QUERIES, WAY_ROWS], tl.float32)
    mixed = tl.zeros([WAYS, QUERIES, DIM], tl.float32)
    for number in tl.static_range(HELD + 1):
        weights = tl.exp2(found[number] - peak[:, :, None])
        together += weights
        mixed = tl.dot(weights.to(dtype), mixtures[number], mixed, input_precision="ieee")
    top, total = tl.reduce((peak, tl.sum(together, 2)), 0, _joined)
    mixed *= tl.exp2(peak - top[None, :])[:, :, None]
    return top, total, sum_of_parts(mixed, WAYS)


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
    WAY_ROWS: tl.constexpr,
    BIASED: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: up to QUERIES queries of SHARED key-value heads of a sample, against a part of the prefix.

    Queries count heads first, then slots. With SHARED > 1 a tile holds ROWS rows of each of the heads, and every query
    is kept to the columns of its own head: queries of several heads fill the rows that the matrix units want.

    With HELD > 0 the first tiles of the rows that earlier passes wrote are asked for before the kernel in front is
    waited for, and the first tile of those after them together with the queries.

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
        settled: rows in front that are cut into tiles of their own; the others are all in the last split.
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
    let_follow(EARLY)
    if HELD == 0:
        wait(EARLY)
    sample = (tl.program_id(0) // (KV_HEADS // SHARED)).to(tl.int64)
    first = (tl.program_id(0) % (KV_HEADS // SHARED)) * SHARED
    entry = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    asked = entry < SHARED * GROUP * fed
    head, slot = entry // fed, entry % fed
    width = tl.arange(0, DIM)
    inside = width < WIDTH
    column = tl.arange(0, COLUMNS)
    place = column % ROWS if SHARED > 1 else column
    mine = query + sample * query_batch + (first * GROUP + head)[:, None] * query_head + slot[:, None] * query_slot
    biases = bias + sample * bias_batch + slot[:, None] * bias_slot
    start = tl.program_id(2) * span * ROWS
    stop = tl.minimum(start + span * ROWS, settled)
    # The rows of a pass come after those of earlier ones, in the last split.
    end = tl.where(tl.program_id(2) == tl.num_programs(2) - 1, prefix, settled)

    peak = tl.full([QUERIES], LOWEST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, DIM], tl.float32)
    if HELD > 0:
        peak, total, mixed = _attend_held(
            mine,
            key + sample * key_batch + first * key_head,
            value + sample * value_batch + first * value_head,
            biases,
            key_row,
            value_row,
            bias_slot,
            start,
            settled,
            end,
            asked,
            scale,
            WIDTH,
            DIM,
            QUERIES,
            ROWS,
            HELD,
            WAY_ROWS,
            BIASED,
            EARLY,
            dtype,
        )
    start += HELD * ROWS
    more = True
    if HELD > 0:
        more = (start < stop) | (settled + ROWS < end)
    if more:
        keys = key + sample * key_batch + (first + column // ROWS)[:, None] * key_head + width[None, :]
        values = value + sample * value_batch + (first + column // ROWS)[:, None] * value_head + width[None, :]
        own = (head // GROUP)[:, None] == (column // ROWS)[None, :]
        queries = tl.load(mine + width, mask=asked[:, None] & inside[None, :], other=0.0).to(dtype)
        # Settled rows, then those of the pass that one tile does not hold.
        for fresh in tl.static_range(2 if HELD > 0 else 1):
            if fresh:
                start, stop, limit = settled + ROWS, end, end
            else:
                limit = settled
            for beginning in range(start, stop, ROWS):
                row = beginning + place
                seen = (row < limit)[None, :]
                loaded = (row < limit)[:, None] & inside[None, :]
                tile = tl.load(keys + row[:, None] * key_row, mask=loaded, other=0.0)
                mixture = tl.load(values + row[:, None] * value_row, mask=loaded, other=0.0)
                products = tl.dot(queries, tl.trans(_widened(tile, dtype)), input_precision="ieee")
                if SHARED > 1:
                    seen = own & seen
                extra = products
                if BIASED:
                    # Up to the end of its line, not of the rows, so that neighbours are loaded together.
                    there = asked[:, None] & (row < bias_slot)[None, :]
                    extra = tl.load(biases + row[None, :], mask=there, other=0.0)
                scores = _scores(products, seen, extra, scale, BIASED)
                higher = tl.maximum(peak, tl.max(scores, 1))
                weights = tl.exp2(scores - higher[:, None])
                shrink = tl.exp2(peak - higher)
                total = total * shrink + tl.sum(weights, 1)
                mixed *= shrink[:, None]
                mixed = tl.dot(weights.to(dtype), _widened(mixture, dtype), mixed, input_precision="ieee")
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
    follow(EARLY)
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    width = tl.arange(0, DIM)
    there = line < lines
    kept = there[:, None] & (width < WIDTH)[None, :]
    peak = tl.full([LINES], LOWEST, tl.float32)
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
