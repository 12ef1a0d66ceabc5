# ruff: noqa: N803, D417, RUF005 - constants of a kernel are upper case by custom; Triton has no starred tuples
# mypy: disable-error-code="assignment"
"""Triton kernels: products of a decoding pass of few rows and what stands around them; called by vgen.layers.few_rows.

A product is one of three kinds:

- ``BY_ROW``: without matrix units, whole weight tiles in registers; for up to 4 rows.
- ``HELD``: by matrix products, all weight tiles asked for at once.
- ``STREAMED``: by matrix products, some weight tiles in flight at a time.

The first two ask for their weights before they wait for the kernel in front of theirs (programmatic dependent launch,
``EARLY``), so that the device's memory is busy while the few rows of the stream go from kernel to kernel. What else a
kernel reads it asks for before it begins to multiply, since no wait for memory is as short as none.

Sums are in float32 and in a fixed order: equal inputs give equal bits.
"""

import triton
import triton.language as tl

from vgen.layers.many_row_kernels import ask_for_rotation, let_follow, silu_product, wait, write_rotated
from vgen.layers.matrix_product_kernels import (
    ask_before,
    ask_for_rows,
    ask_for_tiles,
    keep_here,
    multiply_tiles,
    stream_product,
    weight_line,
)

BY_ROW = tl.constexpr(0)
STREAMED = tl.constexpr(2)


@triton.jit
def _weight_tiles(
    weight, first, N: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr
):
    """Rows of a weight [N, K], or [2 N, K], as tiles [LINES, INNER], all loads in flight at once."""
    line, there = weight_line(first, tl.arange(0, LINES), N, COLUMNS)
    tiles = ()
    for chunk in tl.static_range((K + INNER - 1) // INNER):
        inner = (chunk * INNER + tl.arange(0, INNER))[None, :]
        if N % COLUMNS == 0 and K % INNER == 0:
            tile = tl.load(weight + line[:, None] * K + inner)
        else:
            tile = tl.load(weight + line[:, None] * K + inner, mask=there[:, None] & (inner < K), other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _stack(parts, COUNT: tl.constexpr):
    """One tensor [A, B, COUNT] of 1, 2 or 4 tensors [A, B], so that one reduction serves them all."""
    if COUNT == 1:
        return parts[0][:, :, None]
    elif COUNT == 2:
        return tl.join(parts[0], parts[1])
    else:
        both = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
        return tl.reshape(both, [both.shape[0], both.shape[1], COUNT])


@triton.jit
def _row_tiles(x, rows, K: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr):
    """Rows of x [rows, K], each as float32 tiles [1, INNER]."""
    values = ()
    for row in tl.static_range(ROWS):
        tiles = ()
        for chunk in tl.static_range((K + INNER - 1) // INNER):
            inner = (chunk * INNER + tl.arange(0, INNER))[None, :]
            value = tl.load(x + row * K + inner, mask=(inner < K) & (row < rows), other=0.0)
            tiles = tiles + (value.to(tl.float32),)
        values = values + (tiles,)
    return values


@triton.jit
def _partial_sums(weights, values, ROWS: tl.constexpr):
    """Per row, sums over 8 neighbours of products with tiles of a weight: [COLUMNS, INNER / 8, ROWS]."""
    sums = ()
    for row in tl.static_range(ROWS):
        products = weights[0].to(tl.float32) * values[row][0]
        for chunk in tl.static_range(1, len(weights)):
            products += weights[chunk].to(tl.float32) * values[row][chunk]
        # A thread holds neighbours: they are summed before anything goes from thread to thread.
        neighbours = tl.reshape(products, [products.shape[0], products.shape[1] // 8, 8])
        sums = sums + (tl.sum(neighbours, 2),)
    return _stack(sums, ROWS)


@triton.jit
def _by_row(x, weights, rows, K: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr):
    """Product float32 [ROWS, LINES] of x [rows, K] with tiles of a weight."""
    values = _row_tiles(x, rows, K, ROWS, INNER)
    return tl.trans(tl.sum(_partial_sums(weights, values, ROWS), 1))


@triton.jit
def _ask(
    weight,
    first,
    N: tl.constexpr,
    K: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    KIND: tl.constexpr,
):
    """Tiles of a weight as the product of a kind wants them; nothing of a streamed one."""
    if KIND == BY_ROW:
        return _weight_tiles(weight, first, N, K, LINES, COLUMNS, INNER)
    elif KIND == STREAMED:
        return ()
    else:
        return ask_for_tiles(weight, first, N, K, LINES, COLUMNS, INNER, PARTS, SPLITS)


@triton.jit
def _ask_for_x(
    x,
    rows,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    KIND: tl.constexpr,
    FLYING: tl.constexpr,
):
    """Tiles of x as the product of a kind wants them in front of it; the others ask themselves."""
    if KIND == BY_ROW:  # noqa: SIM114 - "or" of constants is none
        return ()
    elif KIND == STREAMED:
        return ()
    else:
        return ask_for_rows(x, rows, K, ROWS, INNER, PARTS, SPLITS, FLYING)


@triton.jit
def _product(
    x,
    values,
    weights,
    weight,
    first,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    LINES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    KIND: tl.constexpr,
    FLYING: tl.constexpr,
):
    """Product float32 [ROWS, LINES] of x [rows, K] with rows of a weight [N, K], or [2 N, K].

    Args:
        values: what :func:`_ask_for_x` gave of x.
        weights: what :func:`_ask` gave of the weight.
    """
    if KIND == BY_ROW:
        return _by_row(x, weights, rows, K, ROWS, INNER)
    elif KIND == STREAMED:
        return stream_product(x, weight, first, rows, N, K, LINES, ROWS, COLUMNS, INNER, PARTS, SPLITS)
    else:
        return multiply_tiles(x, values, weights, rows, K, LINES, ROWS, INNER, PARTS, SPLITS, FLYING)


@triton.jit
def _ask_for_squares(squares, rows, PARTIALS: tl.constexpr, ROWS: tl.constexpr):
    """Sums of squares of PARTIALS stretches of every row, float32 [a power of two, ROWS]."""
    part = tl.arange(0, triton.next_power_of_2(PARTIALS))[:, None]
    row = tl.arange(0, ROWS)[None, :]
    return tl.load(squares + part * rows + row, mask=(part < PARTIALS) & (row < rows), other=0.0)


@triton.jit
def _factor(squares, eps, K: tl.constexpr):
    """What the norm divides by, [ROWS, 1], for the sums: they are linear in it."""
    return (1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps))[:, None]


@triton.jit(do_not_specialize=["rows", "fed", "rows_batch"])
def project_rows(
    x,
    squares,
    weight,
    query,
    key,
    value,
    rope,
    cache_rows,
    rows,
    fed,
    rope_batch,
    rows_batch,
    cache_batch,
    cache_head,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROPE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    FLYING: tl.constexpr,
    PARTIALS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Query-key-value projection of a norm, rotary code and cache write of few rows.

    Args:
        x: [rows, K], what the norm is of, times its scale.
        squares: float32 [PARTIALS, rows], sums of squares of stretches of the rows without the scale.
    """
    first = tl.program_id(0) * COLUMNS
    let_follow(EARLY)
    weights = _ask(weight, first, N, K, COLUMNS, COLUMNS, INNER, PARTS, 1, KIND)
    wait(EARLY)
    partials = _ask_for_squares(squares, rows, PARTIALS, ROWS)
    values = _ask_for_x(x, rows, K, ROWS, INNER, PARTS, 1, KIND, FLYING)
    rotation = ask_for_rotation(
        rope, cache_rows, 0, first, rows, fed, rope_batch, rows_batch, HEADS, KV_HEADS, HEAD_DIM, ROPE, ROWS, COLUMNS
    )
    ask_before()
    factor = _factor(partials, eps, K)
    sums = _product(
        x, values, weights, weight, first, rows, N, K, COLUMNS, ROWS, COLUMNS, INNER, PARTS, 1, KIND, FLYING
    )
    write_rotated(
        sums * factor,
        rotation,
        query,
        key,
        value,
        0,
        first,
        rows,
        fed,
        cache_batch,
        cache_head,
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        ROPE,
        ROWS,
        COLUMNS,
    )


@triton.jit
def _last_sum(sums, shares, arrivals, place, here, rows, N: tl.constexpr, SPLITS: tl.constexpr):
    """Sum over all programs that share columns, right in the last to arrive, and whether this one is that."""
    tl.store(shares + tl.program_id(1) * rows * N + place, sums, mask=here)
    tl.debug_barrier()
    last = tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        sums = tl.load(shares + place, mask=here, other=0.0, cache_modifier=".cg")
        for split in tl.static_range(1, SPLITS):
            sums += tl.load(shares + split * rows * N + place, mask=here, other=0.0, cache_modifier=".cg")
    return sums, last


@triton.jit(do_not_specialize=["rows"])
def add_rows(
    x,
    weight,
    residual,
    out,
    shares,
    arrivals,
    next_scale,
    scaled,
    squares,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    FLYING: tl.constexpr,
    SQUARED: tl.constexpr,
    NEXT_SCALED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Product of few rows, x W^T, or residual + x W^T with ``ADD``.

    With SPLITS > 1 each of so many programs has a stretch of the inner axis, which leaves it less of x to fetch: it
    writes its share, float32 [SPLITS, rows, N], and the last of them to arrive adds all up, in their order.

    For a norm behind it: with SQUARED every program leaves the sum of squares of its columns, with NEXT_SCALED also the
    result times the norm's scale.
    """
    first = tl.program_id(0) * COLUMNS
    let_follow(EARLY)
    weight += tl.program_id(1) * (K // SPLITS)
    weights = _ask(weight, first, N, K, COLUMNS, COLUMNS, INNER, PARTS, SPLITS, KIND)
    column = (first + tl.arange(0, COLUMNS))[None, :]
    if NEXT_SCALED:
        factor = tl.load(next_scale + column, mask=column < N, other=0.0).to(tl.float32)
    wait(EARLY)
    row = tl.arange(0, ROWS)[:, None]
    place, here = row * N + column, (row < rows) & (column < N)
    if ADD:
        base = tl.load(residual + place, mask=here, other=0.0)
    x += tl.program_id(1) * (K // SPLITS)
    values = _ask_for_x(x, rows, K, ROWS, INNER, PARTS, SPLITS, KIND, FLYING)
    ask_before()
    if ADD:
        base = keep_here(base).to(tl.float32)
    sums = _product(
        x, values, weights, weight, first, rows, N, K, COLUMNS, ROWS, COLUMNS, INNER, PARTS, SPLITS, KIND, FLYING
    )
    mine = row < rows
    if SPLITS > 1:
        sums, last = _last_sum(sums, shares, arrivals, place, here, rows, N, SPLITS)
        here, mine = here & last, mine & last
    dtype = out.dtype.element_ty
    sums = sums.to(dtype)
    if ADD:
        sums = (base + sums.to(tl.float32)).to(dtype)
    tl.store(out + place, sums, mask=here)
    if SQUARED:
        value = sums.to(tl.float32)
        tl.store(squares + tl.program_id(0) * rows + row, tl.sum(value * value, 1, keep_dims=True), mask=mine)
        if NEXT_SCALED:
            tl.store(scaled + place, (value * factor).to(dtype), mask=here)


@triton.jit(do_not_specialize=["rows"])
def gate_rows(
    x,
    squares,
    weight,
    out,
    arrivals,
    rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    FLYING: tl.constexpr,
    CLEARED: tl.constexpr,
    PARTIALS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Gated products of a norm of few rows: silu(norm W^T) (norm V^T), W and V one above the other.

    x and squares are those of :func:`project_rows`. The first program sets CLEARED ``arrivals`` of the product behind
    to 0.
    """
    first = tl.program_id(0) * COLUMNS
    let_follow(EARLY)
    weights = _ask(weight, first, N, K, 2 * COLUMNS, COLUMNS, INNER, PARTS, 1, KIND)
    wait(EARLY)
    if CLEARED > 0 and tl.program_id(0) == 0:
        number = tl.arange(0, CLEARED)
        tl.store(arrivals + number, number * 0)
    partials = _ask_for_squares(squares, rows, PARTIALS, ROWS)
    values = _ask_for_x(x, rows, K, ROWS, INNER, PARTS, 1, KIND, FLYING)
    ask_before()
    factor = _factor(partials, eps, K)
    both = _product(
        x, values, weights, weight, first, rows, N, K, 2 * COLUMNS, ROWS, COLUMNS, INNER, PARTS, 1, KIND, FLYING
    )
    a, b = tl.split(tl.trans(tl.reshape(both * factor, [ROWS, 2, COLUMNS]), 0, 2, 1))
    row = tl.arange(0, ROWS)[:, None]
    column = (first + tl.arange(0, COLUMNS))[None, :]
    tl.store(out + row * N + column, silu_product(a, b, out.dtype.element_ty), mask=(row < rows) & (column < N))
