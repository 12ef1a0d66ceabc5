# ruff: noqa: N803, N806, RUF005 - constants of a kernel are upper case by custom; Triton has no starred tuples
# mypy: disable-error-code="assignment"
"""Triton kernels: products of a decoding pass of few rows and what stands around them; called by vgen.layers.fused.

A product is one of three kinds:

- ``BY_ROW``: without matrix units, whole weight tiles in registers; for up to 4 rows.
- ``HELD``: by matrix products, whole weight tiles in registers.
- ``STREAMED``: by matrix products, weight tiles come through shared memory, several in flight.

The first two ask for their weights before they wait for the kernel in front of theirs (programmatic dependent launch,
``EARLY``), so that the device's memory is busy while the few rows of the stream go from kernel to kernel.

Sums are in float32 and in a fixed order: equal inputs give equal bits.
"""

import triton
import triton.language as tl

from vgen.layers.many_row_kernels import follow, let_follow, silu_product, wait, write_rotated

BY_ROW = tl.constexpr(0)
HELD = tl.constexpr(1)
STREAMED = tl.constexpr(2)


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
def _load_tile(
    base, lines, start, count, COUNTED: tl.constexpr, K: tl.constexpr, INNER: tl.constexpr, DOWN: tl.constexpr
):
    """INNER numbers from ``start`` of lines of [count, K]: a tile [lines, INNER], or [INNER, lines] if ``DOWN``."""
    inner = start + tl.arange(0, INNER)
    if DOWN:
        place = base + lines[None, :] * K + inner[:, None]
        here = (lines < count)[None, :]
        within = (inner < K)[:, None]
    else:
        place = base + lines[:, None] * K + inner[None, :]
        here = (lines < count)[:, None]
        within = (inner < K)[None, :]
    if K % INNER != 0:
        return tl.load(place, mask=here & within, other=0.0)
    elif COUNTED:
        return tl.load(place, mask=here, other=0.0)
    else:
        return tl.load(place)


@triton.jit
def _load_scale(scale, start, K: tl.constexpr, INNER: tl.constexpr):
    """INNER numbers of the learned scale of a norm."""
    inner = start + tl.arange(0, INNER)
    if K % INNER == 0:
        return tl.load(scale + inner)
    else:
        return tl.load(scale + inner, mask=inner < K, other=0.0)


@triton.jit
def _scaled(value, factor, DOWN: tl.constexpr):
    """A tile of x times the learned scale of its norm."""
    if DOWN:
        return (value.to(tl.float32) * factor.to(tl.float32)[:, None]).to(value.dtype)
    else:
        return (value.to(tl.float32) * factor.to(tl.float32)[None, :]).to(value.dtype)


@triton.jit
def _keep_here(value):
    """The same two-byte numbers; the compiler does not move what made them behind the way into the matrix units."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=value.dtype, is_pure=False, pack=2)


@triton.jit
def _multiply(tile, value, out, TURNED: tl.constexpr):
    """Add the product of tiles of a weight and of x to ``out``, [COLUMNS, ROWS], or [ROWS, COLUMNS] if ``TURNED``."""
    if TURNED:
        return tl.dot(value, tile, out, input_precision="ieee")
    else:
        return tl.dot(tile, value, out, input_precision="ieee")


@triton.jit
def _add_squares(value, ones, squares, TURNED: tl.constexpr):
    """Squares of a tile of x, summed by the product with ``ones`` unless they are None."""
    wide = value.to(tl.float32)
    if ones is None:
        return squares + wide * wide
    else:
        return _multiply(ones, (wide * wide).to(tl.bfloat16), squares, TURNED)


@triton.jit
def _matrix_product(
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
    """The kinds of :func:`_product` that run on matrix units; the weight is the second operand if ``TURNED``."""
    columns = first + tl.arange(0, COLUMNS)
    index = tl.arange(0, ROWS)
    # Both operands lie along their inner axis in memory.
    DOWN: tl.constexpr = not TURNED
    RAGGED: tl.constexpr = N % COLUMNS != 0
    if TURNED:
        out = tl.zeros([ROWS, COLUMNS], tl.float32)
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    else:
        out = tl.zeros([COLUMNS, ROWS], tl.float32)
        gate = tl.zeros([COLUMNS, ROWS], tl.float32)
    # Squares of x are summed by the matrix units where x is in their layout anyway: another one means bank conflicts.
    # Those of float16 numbers need the range of float32.
    BY_UNITS: tl.constexpr = KIND == STREAMED and x.dtype.element_ty == tl.bfloat16
    ones = None
    if BY_UNITS and TURNED:
        ones = tl.full([INNER, 8], 1.0, tl.bfloat16)
        squares = tl.zeros([ROWS, 8], tl.float32)
    elif BY_UNITS:
        ones = tl.full([16, INNER], 1.0, tl.bfloat16)
        squares = tl.zeros([16, ROWS], tl.float32)
    elif TURNED:
        squares = tl.zeros([ROWS, INNER], tl.float32)
    else:
        squares = tl.zeros([INNER, ROWS], tl.float32)
    if KIND == HELD:
        CHUNKS: tl.constexpr = (K + INNER - 1) // INNER
        let_follow(EARLY)
        weights, others, factors = (), (), ()
        for chunk in tl.static_range(CHUNKS):
            if SCALED:
                factors = factors + (_load_scale(scale, chunk * INNER, K, INNER),)
            weights = weights + (_load_tile(weight, columns, chunk * INNER, N, RAGGED, K, INNER, TURNED),)
            if GATED:
                others = others + (_load_tile(second, columns, chunk * INNER, N, RAGGED, K, INNER, TURNED),)
        wait(EARLY)
        values = ()
        for chunk in tl.static_range(min(FLYING, CHUNKS)):
            values = values + (_load_tile(x, index, chunk * INNER, rows, True, K, INNER, DOWN),)
        for chunk in tl.static_range(CHUNKS):
            if chunk + FLYING < CHUNKS:
                values = values + (_load_tile(x, index, (chunk + FLYING) * INNER, rows, True, K, INNER, DOWN),)
            value = values[chunk]
            if NORM:
                squares = _add_squares(value, ones, squares, TURNED)
                if SCALED:
                    value = _scaled(value, factors[chunk], DOWN)
                    if x.dtype.element_ty == tl.bfloat16:
                        value = _keep_here(value)
            out = _multiply(weights[chunk], value, out, TURNED)
            if GATED:
                gate = _multiply(others[chunk], value, gate, TURNED)
    else:
        follow(EARLY)
        for start in range(0, K, INNER):
            value = _load_tile(x, index, start, rows, True, K, INNER, DOWN)
            tile = _load_tile(weight, columns, start, N, RAGGED, K, INNER, TURNED)
            if NORM:
                squares = _add_squares(value, ones, squares, TURNED)
                if SCALED:
                    value = _scaled(value, _load_scale(scale, start, K, INNER), DOWN)
            out = _multiply(tile, value, out, TURNED)
            if GATED:
                other = _load_tile(second, columns, start, N, RAGGED, K, INNER, TURNED)
                gate = _multiply(other, value, gate, TURNED)
    if not TURNED:
        out, gate = tl.trans(out), tl.trans(gate)
    if NORM:
        # The sums are linear in the row's factor, which is known only now.
        total = tl.sum(squares, 1 if TURNED else 0)
        if BY_UNITS:
            # Every line of the product is the whole sum.
            total = total / (8 if TURNED else 16)
        norm = (1.0 / tl.sqrt(total / K + eps))[:, None]
        out, gate = out * norm, gate * norm
    return out, gate


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
        return _matrix_product(
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
