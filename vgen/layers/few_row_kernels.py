# ruff: noqa: N803, N806, RUF005 - constants of a kernel are upper case by custom; Triton has no starred tuples
# mypy: disable-error-code="assignment"
"""Triton kernels: products of a decoding pass of few rows and what stands around them; called by vgen.layers.fused.

A product is one of three kinds:

- ``BY_ROW``: without matrix units, whole weight tiles in registers; for up to 4 rows.
- ``HELD``: by matrix products, all weight tiles asked for at once.
- ``STREAMED``: by matrix products, some weight tiles in flight at a time.

The first two ask for their weights before they wait for the kernel in front of theirs (programmatic dependent launch,
``EARLY``), so that the device's memory is busy while the few rows of the stream go from kernel to kernel.

Sums are in float32 and in a fixed order: equal inputs give equal bits.
"""

import triton
import triton.language as tl

from vgen.layers.many_row_kernels import follow, silu_product, write_rotated
from vgen.layers.matrix_product_kernels import matrix_product

BY_ROW = tl.constexpr(0)


@triton.jit
def _weight_tiles(weight, first, N: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """Rows of a weight [N, K] as tiles [COLUMNS, INNER], all loads in flight at once."""
    rows = (first + tl.arange(0, COLUMNS))[:, None]
    tiles = ()
    for chunk in tl.static_range((K + INNER - 1) // INNER):
        inner = (chunk * INNER + tl.arange(0, INNER))[None, :]
        if N % COLUMNS == 0 and K % INNER == 0:
            tile = tl.load(weight + rows * K + inner)
        else:
            tile = tl.load(weight + rows * K + inner, mask=(rows < N) & (inner < K), other=0.0)
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
def _unstack(stacked, COUNT: tl.constexpr):
    """The tensors [1, 1] of one [1, COUNT]."""
    if COUNT == 1:
        return (stacked,)
    elif COUNT == 2:
        a, b = tl.split(stacked)
        return (a[:, None], b[:, None])
    else:
        even, odd = tl.split(tl.reshape(stacked, [1, 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return (a[:, None], b[:, None], c[:, None], d[:, None])


@triton.jit
def _row_tiles(
    x,
    scale,
    rows,
    eps,
    K: tl.constexpr,
    NORM: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Rows of x [rows, K], each as float32 tiles [1, INNER]; rounded where the norm layer rounds, if normalised."""
    CHUNKS: tl.constexpr = (K + INNER - 1) // INNER
    values, squares = (), ()
    for row in tl.static_range(ROWS):
        tiles = ()
        square = tl.zeros([1, INNER], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            inner = (chunk * INNER + tl.arange(0, INNER))[None, :]
            value = tl.load(x + row * K + inner, mask=(inner < K) & (row < rows), other=0.0).to(tl.float32)
            square += value * value
            tiles = tiles + (value,)
        values = values + (tiles,)
        squares = squares + (square,)
    if NORM:
        factors = _unstack(1.0 / tl.sqrt(tl.sum(_stack(squares, ROWS), 1) / K + eps), ROWS)
        normal = ()
        for row in tl.static_range(ROWS):
            tiles = ()
            for chunk in tl.static_range(CHUNKS):
                value = (values[row][chunk] * factors[row]).to(x.dtype.element_ty).to(tl.float32)
                if SCALED:
                    inner = (chunk * INNER + tl.arange(0, INNER))[None, :]
                    value = value * tl.load(scale + inner, mask=inner < K, other=0.0).to(tl.float32)
                    value = value.to(x.dtype.element_ty).to(tl.float32)
                tiles = tiles + (value,)
            normal = normal + (tiles,)
        values = normal
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
def _product(
    x,
    scale,
    weight,
    second,
    first,
    rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    KIND: tl.constexpr,
    TURNED: tl.constexpr,
    FLYING: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Product of x [rows, K] (or its norm) with rows of a weight [N, K], and of a second one if ``GATED``.

    Returns:
        Two tensors float32 [ROWS, COLUMNS]; the second means nothing if there is one weight.
    """
    if KIND == BY_ROW:
        weights = _weight_tiles(weight, first, N, K, COLUMNS, INNER)
        if GATED:
            others = _weight_tiles(second, first, N, K, COLUMNS, INNER)
        follow(EARLY)
        values = _row_tiles(x, scale, rows, eps, K, NORM, SCALED, ROWS, INNER)
        sums = _partial_sums(weights, values, ROWS)
        if GATED:
            a, b = tl.split(tl.sum(tl.join(sums, _partial_sums(others, values, ROWS)), 1))
            return tl.trans(a), tl.trans(b)
        else:
            out = tl.trans(tl.sum(sums, 1))
            return out, out
    else:
        return matrix_product(
            x,
            scale,
            weight,
            second,
            first,
            rows,
            eps,
            N,
            K,
            NORM,
            SCALED,
            GATED,
            ROWS,
            COLUMNS,
            INNER,
            KIND,
            TURNED,
            FLYING,
            EARLY,
        )


@triton.jit(do_not_specialize=["rows", "fed", "rows_batch"])
def project_rows(
    x,
    scale,
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
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    KIND: tl.constexpr,
    TURNED: tl.constexpr,
    FLYING: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Norm, query-key-value projection, rotary code and cache write of few rows."""
    first = tl.program_id(0) * COLUMNS
    sums, _ = _product(
        x,
        scale,
        weight,
        weight,
        first,
        rows,
        eps,
        N,
        K,
        True,
        SCALED,
        False,
        ROWS,
        COLUMNS,
        INNER,
        KIND,
        TURNED,
        FLYING,
        EARLY,
    )
    write_rotated(
        sums,
        query,
        key,
        value,
        rope,
        cache_rows,
        0,
        first,
        rows,
        fed,
        rope_batch,
        rows_batch,
        cache_batch,
        cache_head,
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        ROPE,
        ROWS,
        COLUMNS,
    )


@triton.jit(do_not_specialize=["rows"])
def add_rows(
    x,
    weight,
    residual,
    out,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    KIND: tl.constexpr,
    TURNED: tl.constexpr,
    FLYING: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Product and sum of few rows: residual + x W^T."""
    first = tl.program_id(0) * COLUMNS
    sums, _ = _product(
        x,
        x,
        weight,
        weight,
        first,
        rows,
        0.0,
        N,
        K,
        False,
        False,
        False,
        ROWS,
        COLUMNS,
        INNER,
        KIND,
        TURNED,
        FLYING,
        EARLY,
    )
    row = tl.arange(0, ROWS)[:, None]
    column = (first + tl.arange(0, COLUMNS))[None, :]
    here = (row < rows) & (column < N)
    dtype = out.dtype.element_ty
    base = tl.load(residual + row * N + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * N + column, (base + sums.to(dtype).to(tl.float32)).to(dtype), mask=here)


@triton.jit(do_not_specialize=["rows"])
def gate_rows(
    x,
    scale,
    weight,
    second,
    out,
    rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    KIND: tl.constexpr,
    TURNED: tl.constexpr,
    FLYING: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Norm and gated products of few rows: silu(norm(x) W^T) (norm(x) V^T)."""
    first = tl.program_id(0) * COLUMNS
    a, b = _product(
        x,
        scale,
        weight,
        second,
        first,
        rows,
        eps,
        N,
        K,
        True,
        SCALED,
        True,
        ROWS,
        COLUMNS,
        INNER,
        KIND,
        TURNED,
        FLYING,
        EARLY,
    )
    row = tl.arange(0, ROWS)[:, None]
    column = (first + tl.arange(0, COLUMNS))[None, :]
    tl.store(out + row * N + column, silu_product(a, b, out.dtype.element_ty), mask=(row < rows) & (column < N))
