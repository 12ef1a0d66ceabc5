# ruff: noqa: N803, N806, D417 - constants of a kernel are upper case by custom
"""Triton kernel: all blocks of a decoding pass of few rows in one launch; called by vgen.layers.persistent.

As many programs as the device holds at once stay from the first block to the last. A block is five steps (projection,
attention, output projection, gated products, product with the second matrix of the feed-forward layer), each of which
is cut into tasks. A program asks for the weights of its next task, then waits until the step in front is complete:
a counter per step, which every finished task raises. No launch lies between two steps, and the device's memory is busy
while the few rows go from step to step.

A step reads what the step in front wrote, and no buffer is written again before all who read it are done: the tasks of
a step begin when all tasks of the step in front have ended, so those of earlier steps have too.
"""

import triton
import triton.language as tl

from vgen.layers.few_row_kernels import add, ask, gate, project
from vgen.layers.short_attention_kernels import ask_for_rows, attend

STEPS = tl.constexpr(5)
POINTERS = tl.constexpr(6)


@triton.jit
def _pointer(address, dtype: tl.constexpr):
    """A weight by its address; weights are aligned as PyTorch allocates them."""
    return tl.multiple_of(tl.multiple_of(address, 16).to(tl.pointer_type(dtype), bitcast=True), 16)


@triton.jit
def _await(counter, count):
    """Wait until ``count`` tasks have arrived; what they wrote before is then there to be read."""
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < count:
        pass


@triton.jit
def _arrive(counter):
    """Let those who wait know of a finished task: of what all threads of this program have written."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit(do_not_specialize=["layers", "rows", "fed", "prefix", "settled", "units", "parts", "rows_batch"])
def run_blocks(
    table,
    states,
    query,
    seen,
    middle,
    hidden,
    cache,
    rope,
    cache_rows,
    bias,
    counters,
    layers,
    rows,
    fed,
    prefix,
    settled,
    units,
    parts,
    rope_batch,
    rows_batch,
    cache_layer,
    cache_value,
    cache_batch,
    cache_head,
    bias_slot,
    attention_eps,
    ffn_eps,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROPE: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    PROJECT: tl.constexpr,
    WO: tl.constexpr,
    GATE: tl.constexpr,
    W2: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HELD: tl.constexpr,
    FRESH: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Residual streams behind all blocks.

    Args:
        table: int64 [layers, POINTERS], addresses of projection, output projection, the two gated matrices one above
            the other, second matrix of the feed-forward layer, scale of the first and of the second norm.
        states: [layers + 1, rows, DIM]; the first is the input, the others are written.
        query: [rows, HEADS HEAD_DIM], like the next three a buffer.
        seen: [rows, HEADS HEAD_DIM].
        middle: [rows, DIM].
        hidden: [rows, HIDDEN].
        cache: [layers, 2, B, KV_HEADS, cache rows, HEAD_DIM]; the numbers named after it are its strides.
        rope: float32 [fed or rows, HEAD_DIM / 2, 2]; rope_batch = 0 where samples share it; not read unless ROPE.
        cache_rows: int64 [fed or rows]; rows_batch = 0 where samples share them.
        bias: [fed, bias_slot], added to the scores; not read unless BIASED.
        counters: int32 [1 + layers STEPS] zeros.
        layers: number of blocks.
        rows: samples times slots.
        fed: slots.
        prefix: visible leading cache rows.
        settled: leading rows of these that earlier passes wrote.
        units: samples times KV_HEADS.
        parts: of QUERIES queries per unit.
        scale: factor of the scores, in powers of two.
        PROJECT: cut of a product: kind, columns, inner, parts, flying; see :class:`vgen.layers.tiles.Tile`.
        WIDTH: HEAD_DIM rounded up to what the matrix units take.
        KEYS: settled rows per tile, of which HELD are asked for ahead; the others are read FRESH at a time.
    """
    dtype: tl.constexpr = states.dtype.element_ty
    GROUP: tl.constexpr = HEADS // KV_HEADS
    OUTER: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    PROJECT_TASKS: tl.constexpr = (OUTER + PROJECT[1] - 1) // PROJECT[1]
    WO_TASKS: tl.constexpr = (DIM + WO[1] - 1) // WO[1]
    GATE_TASKS: tl.constexpr = (HIDDEN + GATE[1] - 1) // GATE[1]
    W2_TASKS: tl.constexpr = (DIM + W2[1] - 1) // W2[1]
    program = tl.program_id(0)
    heads = units * parts
    projection, output, gates = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    down, first_norm, second_norm = tl.load(table + 3), tl.load(table + 4), tl.load(table + 5)
    for layer in tl.range(0, layers, num_stages=1, disable_licm=True):
        # Asked for a block ahead: weights must not wait for their addresses.
        entry = table + tl.minimum(layer + 1, layers - 1) * POINTERS
        next_projection, next_output, next_gates = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        next_down, next_first, next_second = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
        state = states + layer * rows * DIM
        keys = cache + tl.cast(layer, tl.int64) * cache_layer
        values = keys + cache_value
        done = counters + 1 + layer * STEPS
        for task in tl.range(program, PROJECT_TASKS, PROGRAMS, num_stages=1, disable_licm=True):
            weight, norm = _pointer(projection, dtype), _pointer(first_norm, dtype)
            first = task * PROJECT[1]
            tiles = ask(
                weight,
                norm,
                first,
                OUTER,
                DIM,
                SCALED,
                PROJECT[1],
                PROJECT[1],
                PROJECT[2],
                PROJECT[3],
                PROJECT[0],
            )
            _await(done - 1, tl.where(layer > 0, W2_TASKS, 0))
            project(
                state,
                norm,
                tiles,
                weight,
                query,
                keys,
                values,
                rope,
                cache_rows,
                first,
                rows,
                fed,
                rope_batch,
                rows_batch,
                cache_batch,
                cache_head,
                attention_eps,
                HEADS,
                KV_HEADS,
                HEAD_DIM,
                ROPE,
                OUTER,
                DIM,
                SCALED,
                ROWS,
                PROJECT[1],
                PROJECT[2],
                PROJECT[0],
                PROJECT[3],
                PROJECT[4],
            )
            _arrive(done)
        # The last programs, which the projection leaves idle first: they ask for earlier keys all the sooner.
        for task in tl.range(PROGRAMS - 1 - program, heads, PROGRAMS, num_stages=1, disable_licm=True):
            unit = task // parts
            held, mixtures = ask_for_rows(
                keys,
                values,
                cache_batch,
                cache_head,
                HEAD_DIM,
                cache_batch,
                cache_head,
                HEAD_DIM,
                unit,
                0,
                settled,
                KV_HEADS,
                HEAD_DIM,
                WIDTH,
                1,
                KEYS,
                HELD,
            )
            _await(done, PROJECT_TASKS)
            attend(
                query,
                keys,
                values,
                bias,
                seen,
                seen,
                seen,
                fed * (HEADS * HEAD_DIM),
                HEAD_DIM,
                HEADS * HEAD_DIM,
                cache_batch,
                cache_head,
                HEAD_DIM,
                cache_batch,
                cache_head,
                HEAD_DIM,
                bias_slot,
                fed,
                prefix,
                settled,
                tl.cdiv(settled, KEYS),
                scale,
                held,
                mixtures,
                unit,
                units,
                task % parts,
                0,
                1,
                KV_HEADS,
                GROUP,
                HEAD_DIM,
                WIDTH,
                1,
                QUERIES,
                KEYS,
                HELD,
                FRESH,
                BIASED,
                False,
            )
            _arrive(done + 1)
        for task in tl.range(program, WO_TASKS, PROGRAMS, num_stages=1, disable_licm=True):
            weight = _pointer(output, dtype)
            first = task * WO[1]
            tiles = ask(weight, seen, first, DIM, HEADS * HEAD_DIM, False, WO[1], WO[1], WO[2], WO[3], WO[0])
            _await(done + 1, heads)
            add(
                seen,
                tiles,
                weight,
                state,
                middle,
                first,
                rows,
                DIM,
                HEADS * HEAD_DIM,
                True,
                ROWS,
                WO[1],
                WO[2],
                WO[0],
                WO[3],
                WO[4],
            )
            _arrive(done + 2)
        for task in tl.range(program, GATE_TASKS, PROGRAMS, num_stages=1, disable_licm=True):
            weight, norm = _pointer(gates, dtype), _pointer(second_norm, dtype)
            first = task * GATE[1]
            tiles = ask(weight, norm, first, HIDDEN, DIM, SCALED, 2 * GATE[1], GATE[1], GATE[2], GATE[3], GATE[0])
            _await(done + 2, WO_TASKS)
            gate(
                middle,
                norm,
                tiles,
                weight,
                hidden,
                first,
                rows,
                ffn_eps,
                HIDDEN,
                DIM,
                SCALED,
                ROWS,
                GATE[1],
                GATE[2],
                GATE[0],
                GATE[3],
                GATE[4],
            )
            _arrive(done + 3)
        for task in tl.range(program, W2_TASKS, PROGRAMS, num_stages=1, disable_licm=True):
            weight = _pointer(down, dtype)
            first = task * W2[1]
            tiles = ask(weight, hidden, first, DIM, HIDDEN, False, W2[1], W2[1], W2[2], W2[3], W2[0])
            _await(done + 3, GATE_TASKS)
            add(
                hidden,
                tiles,
                weight,
                middle,
                state + rows * DIM,
                first,
                rows,
                DIM,
                HIDDEN,
                True,
                ROWS,
                W2[1],
                W2[2],
                W2[0],
                W2[3],
                W2[4],
            )
            _arrive(done + 4)
        projection, output, gates = next_projection, next_output, next_gates
        down, first_norm, second_norm = next_down, next_first, next_second
