# ruff: noqa: N803, N806, RUF005 - constants of a kernel are upper case by custom; Triton has no starred tuples
# mypy: disable-error-code="assignment,var-annotated"
"""The part of the Triton kernels of few rows that runs on matrix units; called by vgen.layers.few_row_kernels."""

import triton
import triton.language as tl

from vgen.layers.many_row_kernels import follow, let_follow, wait

HELD = tl.constexpr(1)
STREAMED = tl.constexpr(2)


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
def matrix_product(
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

    HELD: whole weight tiles are asked for before x is there. STREAMED: FLYING is not used, the loop is pipelined by the
    compiler. The weight is the second operand if ``TURNED``.

    Returns:
        Two tensors float32 [ROWS, COLUMNS]; the second means nothing if there is one weight.
    """
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
