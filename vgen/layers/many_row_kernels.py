# ruff: noqa: N803, N806, D417 - constants of a kernel are upper case by custom
"""Triton kernels for what lies between the products of a decoding pass of many rows; called by vgen.layers.many_rows.

A kernel may be there before the one in front of it is done (programmatic dependent launch, ``EARLY``); all of them wait
before they read what others wrote, so one that waited for its predecessor has waited for all before it.
"""

import triton
import triton.language as tl


@triton.jit
def let_follow(EARLY: tl.constexpr):
    """Let the next kernel come."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(EARLY: tl.constexpr):
    """Wait for the results of the last kernel."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def follow(EARLY: tl.constexpr):
    """Let the next kernel come, then wait for the results of the last one."""
    let_follow(EARLY)
    wait(EARLY)


@triton.jit
def ask_for_rotation(
    rope,
    cache_rows,
    first_row,
    first,
    rows,
    fed,
    rope_batch,
    rows_batch,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Cosines and sines of projections [ROWS, COLUMNS], joined, and the cache rows [ROWS, 1], for `write_rotated`."""
    row = first_row + tl.arange(0, ROWS)[:, None]
    sample = row // fed
    slot = row - sample * fed
    target = tl.load(cache_rows + sample * rows_batch + slot, mask=row < rows, other=0)
    if ROPE:
        pair = (first + 2 * tl.arange(0, COLUMNS // 2))[None, :]
        turned = (row < rows) & (pair < (HEADS + KV_HEADS) * HEAD_DIM)
        both = tl.arange(0, 2)[None, None, :]
        place = (rope + sample * rope_batch + slot * HEAD_DIM + pair % HEAD_DIM)[:, :, None] + both
        return tl.load(place, mask=turned[:, :, None], other=1.0 - both), target
    else:
        return target, target


@triton.jit
def write_rotated(
    sums,
    rotation,
    query,
    key,
    value,
    first_row,
    first,
    rows,
    fed,
    cache_batch,
    cache_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rotate projections float32 [ROWS, COLUMNS]; queries go to a buffer, keys and values to their cache rows."""
    dtype = query.dtype.element_ty
    N: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    row = first_row + tl.arange(0, ROWS)[:, None]
    sums = sums.to(dtype).to(tl.float32)
    if ROPE:
        a, b = tl.split(tl.reshape(sums, [ROWS, COLUMNS // 2, 2]))
        cos, sin = tl.split(rotation[0])
        sums = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [ROWS, COLUMNS])
    out = sums.to(dtype)
    column = (first + tl.arange(0, COLUMNS))[None, :]
    head = column // HEAD_DIM
    within = column - head * HEAD_DIM
    here = (row < rows) & (column < N)
    tl.store(query + row.to(tl.int64) * (HEADS * HEAD_DIM) + column, out, mask=here & (head < HEADS))
    place = (row // fed).to(tl.int64) * cache_batch + rotation[1].to(tl.int64) * HEAD_DIM + within
    is_value = head >= HEADS + KV_HEADS
    out = out.to(key.dtype.element_ty)
    tl.store(key + place + (head - HEADS).to(tl.int64) * cache_head, out, mask=here & (head >= HEADS) & (~is_value))
    tl.store(value + place + (head - HEADS - KV_HEADS).to(tl.int64) * cache_head, out, mask=here & is_value)


@triton.jit
def silu_product(a, b, dtype: tl.constexpr):
    """Product silu(a) b of float32 tensors, rounded where the layer rounds."""
    a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    return ((a / (1.0 + tl.exp(-a))).to(dtype).to(tl.float32) * b).to(dtype)


@triton.jit(do_not_specialize=["rows"])
def norm_many(
    x,
    delta,
    scale,
    total,
    normal,
    rows,
    eps,
    K: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Norm of x, or of x + delta, which is kept; ROWS rows a program."""
    follow(EARLY)
    dtype = x.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inner = tl.arange(0, INNER)[None, :]
    here = (row < rows) & (inner < K)
    place = row.to(tl.int64) * K + inner
    value = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
    if ADD:
        value = (value + tl.load(delta + place, mask=here, other=0.0).to(tl.float32)).to(dtype)
        tl.store(total + place, value, mask=here)
        value = value.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 1) / K + eps)
    value = (value * factor[:, None]).to(dtype)
    if SCALED:
        value = value.to(tl.float32) * tl.load(scale + inner, mask=inner < K, other=0.0).to(tl.float32)
    tl.store(normal + place, value.to(dtype), mask=here)


@triton.jit
def _hand_off(value, row, scale, scaled, squares, K: tl.constexpr, SCALED: tl.constexpr, INNER: tl.constexpr):
    """Leave the sum of squares of a row [INNER] and, with ``SCALED``, the row times a scale for a norm behind it."""
    inner = tl.arange(0, INNER)
    wide = value.to(tl.float32)
    tl.store(squares + row, tl.sum(wide * wide, 0))
    if SCALED:
        factor = tl.load(scale + inner, mask=inner < K, other=0.0).to(tl.float32)
        tl.store(scaled + row.to(tl.int64) * K + inner, (wide * factor).to(value.dtype), mask=inner < K)


@triton.jit
def hand_off_rows(
    x,
    scale,
    scaled,
    squares,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    INNER: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What the norm of x [rows, K] needs: sums of squares float32 [rows] and x times its scale; a program has a row."""
    follow(EARLY)
    row = tl.program_id(0)
    inner = tl.arange(0, INNER)
    value = tl.load(x + row.to(tl.int64) * K + inner, mask=inner < K, other=0.0)
    _hand_off(value, row, scale, scaled, squares, K, SCALED, INNER)


@triton.jit(do_not_specialize=["fed", "ids_sample", "index_sample"])
def embed_rows(
    table,
    ids,
    index,
    out,
    scale,
    scaled,
    squares,
    fed,
    ids_sample,
    index_sample,
    K: tl.constexpr,
    SQUARED: tl.constexpr,
    SCALED: tl.constexpr,
    INNER: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rows of a table [V, K] by the tokens in columns ``index`` of the ids; a program writes one row of the result.

    Args:
        ids: int64 [B, N]; ids_sample is its stride.
        index: int64 [fed], or [B, fed] with index_sample as its stride.
        out: [B, fed, K].
        scale: with SQUARED, as in :func:`hand_off_rows`, like the next two.
    """
    follow(EARLY)
    row = tl.program_id(0)
    sample = (row // fed).to(tl.int64)
    column = tl.load(index + sample * index_sample + row % fed)
    token = tl.load(ids + sample * ids_sample + column)
    inner = tl.arange(0, INNER)
    value = tl.load(table + token * K + inner, mask=inner < K, other=0.0)
    tl.store(out + row.to(tl.int64) * K + inner, value, mask=inner < K)
    if SQUARED:
        _hand_off(value, row, scale, scaled, squares, K, SCALED, INNER)


@triton.jit(do_not_specialize=["fed", "decided"])
def norm_gathered(
    x,
    scale,
    sources,
    shares,
    out,
    fed,
    decided,
    eps,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    SHARED: tl.constexpr,
    INNER: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Norm of the slot of x [B, fed, K] that a target is read from, times its share if ``SHARED``; zeros without one.

    Args:
        sources: int64 [decided], the slots, -1 = none.
        shares: float32 [decided].
        out: [B, decided, K]; a program writes one row.
    """
    follow(EARLY)
    dtype = x.dtype.element_ty
    row = tl.program_id(0)
    sample = (row // decided).to(tl.int64)
    target = row % decided
    source = tl.load(sources + target)
    inner = tl.arange(0, INNER)
    value = tl.load(x + (sample * fed + source) * K + inner, mask=(inner < K) & (source >= 0), other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 0) / K + eps)
    value = (value * factor).to(dtype)
    if SCALED:
        value = (value.to(tl.float32) * tl.load(scale + inner, mask=inner < K, other=0.0).to(tl.float32)).to(dtype)
    if SHARED:
        value = (value.to(tl.float32) * tl.load(shares + target)).to(dtype)
    tl.store(out + row.to(tl.int64) * K + inner, value, mask=inner < K)


@triton.jit(do_not_specialize=["rows", "fed", "rows_batch"])
def rotate_many(
    projected,
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
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rotary code and cache write of projections [rows, (HEADS + 2 KV_HEADS) HEAD_DIM]."""
    follow(EARLY)
    N: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    first_row, first = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    row = (first_row + tl.arange(0, ROWS))[:, None]
    column = (first + tl.arange(0, COLUMNS))[None, :]
    rotation = ask_for_rotation(
        rope,
        cache_rows,
        first_row,
        first,
        rows,
        fed,
        rope_batch,
        rows_batch,
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        ROPE,
        ROWS,
        COLUMNS,
    )
    sums = tl.load(projected + row.to(tl.int64) * N + column, mask=(row < rows) & (column < N), other=0.0)
    write_rotated(
        sums,
        rotation,
        query,
        key,
        value,
        first_row,
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


@triton.jit(do_not_specialize=["rows", "fed"])
def join_rotated(
    query,
    key,
    value,
    rope,
    out,
    rows,
    fed,
    rope_batch,
    query_batch,
    query_head,
    query_slot,
    key_batch,
    key_head,
    key_slot,
    value_batch,
    value_head,
    value_slot,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients of rotated queries and keys, turned back, and of values, joined as projections are.

    Args:
        query: [B, HEADS, fed, HEAD_DIM], every head_dim contiguous; the numbers named after it are its strides.
        key: [B, KV_HEADS, fed, HEAD_DIM], like query.
        value: like key.
        out: [rows, (HEADS + 2 KV_HEADS) HEAD_DIM]; a program writes COLUMNS numbers of a row.
    """
    N: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    row = tl.program_id(0)
    sample = row // fed
    slot = row - sample * fed
    wide = sample.to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    here = column < N
    head, within = column // HEAD_DIM, column % HEAD_DIM
    of_query, of_value = head < HEADS, head >= HEADS + KV_HEADS
    place = wide * query_batch + head * query_head + slot * query_slot + within
    grad = tl.load(query + place, mask=here & of_query, other=0.0)
    place = wide * key_batch + (head - HEADS) * key_head + slot * key_slot + within
    grad += tl.load(key + place, mask=here & (head >= HEADS) & (head < HEADS + KV_HEADS), other=0.0)
    place = wide * value_batch + (head - HEADS - KV_HEADS) * value_head + slot * value_slot + within
    grad += tl.load(value + place, mask=here & of_value, other=0.0)
    pair = first + 2 * tl.arange(0, COLUMNS // 2)
    turned = pair < (HEADS + KV_HEADS) * HEAD_DIM
    angles = rope + wide * rope_batch + slot * HEAD_DIM + pair % HEAD_DIM
    cos = tl.load(angles, mask=turned, other=1.0)
    sin = tl.load(angles + 1, mask=turned, other=0.0)
    a, b = tl.split(tl.reshape(grad.to(tl.float32), [COLUMNS // 2, 2]))
    grad = tl.reshape(tl.join(a * cos + b * sin, b * cos - a * sin), [COLUMNS])
    tl.store(out + row.to(tl.int64) * N + column, grad.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def gate_many(both, out, rows, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr):
    """Gate of the halves of [rows, 2 N]."""
    follow(EARLY)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    here = (row < rows) & (column < N)
    wide = row.to(tl.int64)
    a = tl.load(both + wide * (2 * N) + column, mask=here, other=0.0).to(tl.float32)
    b = tl.load(both + wide * (2 * N) + N + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + wide * N + column, silu_product(a, b, out.dtype.element_ty), mask=here)
