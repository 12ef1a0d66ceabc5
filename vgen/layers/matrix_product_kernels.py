# ruff: noqa: N803, N806, RUF005 - constants of a kernel are upper case by custom; Triton has no starred tuples
# mypy: disable-error-code="assignment"
"""The part of the Triton kernels of few rows that runs on matrix units; called by vgen.layers.few_row_kernels.

A sum over a long row is a chain of dependent steps for the matrix units, and a few columns of a weight do not fill
them. Rows are therefore cut into PARTS: parts of the weight's rows are stacked to the height that the units want, those
of x side by side, and of the product only the blocks count where a part met itself; their sum is the product. With
SPLITS a program has one of so many stretches of every row; its pointers then point to where that begins.
"""

import triton
import triton.language as tl

from vgen.layers.interpreter import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def weight_line(first, line, N: tl.constexpr, COLUMNS: tl.constexpr):
    """Row of a weight that a line of a tile is: lines from COLUMNS on belong to a second weight, N rows below."""
    return first + line % COLUMNS + (line // COLUMNS) * N, first + line % COLUMNS < N


@triton.jit
def _place(lines, part, start, K: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr):
    """Where INNER numbers from ``start`` of a part of every line lie in [.., K]: [lines, INNER], and which exist."""
    LENGTH: tl.constexpr = K // (PARTS * SPLITS)
    inner = start + tl.arange(0, INNER)
    place = lines[:, None] * K + (part * LENGTH)[:, None] + inner[None, :]
    return place, (inner < LENGTH)[None, :]


@triton.jit
def _weight_tile(
    weight,
    first,
    start,
    N: tl.constexpr,
    K: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A tile of a weight [N, K], or [2 N, K], [PARTS LINES, INNER]."""
    stacked = tl.arange(0, PARTS * LINES)
    line, there = weight_line(first, stacked % LINES, N, COLUMNS)
    place, within = _place(line, stacked // LINES, start, K, INNER, PARTS, SPLITS)
    if N % COLUMNS != 0:
        return tl.load(weight + place, mask=there[:, None] & within, other=0.0)
    elif (K // (PARTS * SPLITS)) % INNER != 0:
        return tl.load(weight + place, mask=within, other=0.0)
    else:
        return tl.load(weight + place)


@triton.jit
def _row_tile(
    x,
    start,
    rows,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A tile of x [rows, K], [INNER, PARTS ROWS]."""
    line = tl.arange(0, PARTS * ROWS)
    place, within = _place(line % ROWS, line // ROWS, start, K, INNER, PARTS, SPLITS)
    return tl.load(x + tl.trans(place), mask=tl.trans((line % ROWS < rows)[:, None] & within), other=0.0)


@triton.jit
def keep_here(value):
    """The same numbers; if of one or two bytes, made here: the compiler does not use them for anything earlier."""
    BITS: tl.constexpr = value.dtype.primitive_bitwidth
    if INTERPRETED or BITS > 16:
        return value
    PACK: tl.constexpr = 32 // BITS
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=value.dtype, is_pure=False, pack=PACK)


@triton.jit
def ask_before():
    """Behind loads of which none is looked at but through :func:`keep_here`: all of them are asked for here.

    Otherwise ptxas saves registers and stores the first away before it asks for the last: some round trips to memory
    instead of one.
    """
    tl.debug_barrier()


@triton.jit
def sum_of_parts(x, PARTS: tl.constexpr):
    """Sum over the first axis of [PARTS, A, B]; PARTS is 2, 4 or 8.

    In halves, for which the compiler brings all parts of a number into one thread: its sums over warps take turns.
    """
    A: tl.constexpr = x.shape[1]
    B: tl.constexpr = x.shape[2]
    x = tl.permute(x, (1, 2, 0))
    if PARTS >= 8:
        first, second = tl.split(tl.reshape(x, [A, B, 4, 2]))
        x = first + second
    if PARTS >= 4:
        first, second = tl.split(tl.reshape(x, [A, B, 2, 2]))
        x = first + second
    first, second = tl.split(tl.reshape(x, [A, B, 2]))
    return first + second


@triton.jit
def _own(product, LINES: tl.constexpr, PARTS: tl.constexpr):
    """Sum [ROWS, LINES] of the blocks of a product [PARTS LINES, PARTS ROWS] where a part met itself.

    Neighbours of a row come into one thread, here and now: the compiler would leave the numbers where the matrix units
    put them and bring everything that is added or stored there, one after the other.
    """
    ROWS: tl.constexpr = product.shape[1] // PARTS
    if PARTS > 1:
        part = tl.arange(0, PARTS * LINES)[:, None] // LINES
        product = tl.where(part == tl.arange(0, PARTS * ROWS)[None, :] // ROWS, product, 0.0)
        product = tl.sum(tl.reshape(product, [PARTS * LINES, PARTS, ROWS]), 1)
        return tl.trans(sum_of_parts(tl.reshape(product, [PARTS, LINES, ROWS]), PARTS))
    else:
        first, second = tl.split(tl.reshape(tl.trans(product), [ROWS, LINES // 2, 2]))
        return tl.reshape(tl.join(first, second), [ROWS, LINES])


@triton.jit
def ask_for_tiles(
    weight,
    first,
    N: tl.constexpr,
    K: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """All tiles of LINES rows of a weight, all loads in flight at once."""
    CHUNKS: tl.constexpr = (K // (PARTS * SPLITS) + INNER - 1) // INNER
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        tiles = tiles + (_weight_tile(weight, first, chunk * INNER, N, K, LINES, COLUMNS, INNER, PARTS, SPLITS),)
    return tiles


@triton.jit
def ask_for_rows(
    x,
    rows,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    FLYING: tl.constexpr,
):
    """The first FLYING tiles of x [rows, K], for `multiply_tiles`."""
    CHUNKS: tl.constexpr = (K // (PARTS * SPLITS) + INNER - 1) // INNER
    values = ()
    for chunk in tl.static_range(min(FLYING, CHUNKS)):
        values = values + (_row_tile(x, chunk * INNER, rows, K, ROWS, INNER, PARTS, SPLITS),)
    return values


@triton.jit
def multiply_tiles(
    x,
    values,
    weights,
    rows,
    K: tl.constexpr,
    LINES: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    FLYING: tl.constexpr,
):
    """Product float32 [ROWS, LINES] of x [rows, K], of which the first tiles are given, with tiles of a weight."""
    CHUNKS: tl.constexpr = (K // (PARTS * SPLITS) + INNER - 1) // INNER
    out = tl.zeros([PARTS * LINES, PARTS * ROWS], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        if chunk + FLYING < CHUNKS:
            values = values + (_row_tile(x, (chunk + FLYING) * INNER, rows, K, ROWS, INNER, PARTS, SPLITS),)
        # The first are multiplied while the last are on their way.
        out = tl.dot(weights[chunk], keep_here(values[chunk]), out, input_precision="ieee")
        # Triton (3.6 to 3.8) lets one half of eight warps store the next tile over the one that the other half still
        # multiplies with.
        tl.debug_barrier()
    return _own(out, LINES, PARTS)


@triton.jit
def stream_product(
    x,
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
):
    """The same with tiles of a weight [N, K], or [2 N, K], that come in a loop, which the compiler pipelines."""
    out = tl.zeros([PARTS * LINES, PARTS * ROWS], tl.float32)
    for start in range(0, K // (PARTS * SPLITS), INNER):
        value = _row_tile(x, start, rows, K, ROWS, INNER, PARTS, SPLITS)
        tile = _weight_tile(weight, first, start, N, K, LINES, COLUMNS, INNER, PARTS, SPLITS)
        out = tl.dot(tile, value, out, input_precision="ieee")
    return _own(out, LINES, PARTS)
