"""Triton kernels that draw tokens from the logits of guidance branches; called by vgen.sampling.draw."""

# Compile-time constants are written in capitals, as Triton does.
# ruff: noqa: N803, D417

import triton
import triton.language as tl

from vgen.layers.many_row_kernels import let_follow, wait


@triton.jit
def _guided(
    logits, line, lines, column, there, weight, temperature, V: tl.constexpr, GUIDED: tl.constexpr, HEATED: tl.constexpr
):
    """Logits float32 of a line after guidance and temperature, -inf where not ``there``."""
    at = logits + line.to(tl.int64) * V + column
    guided = tl.load(at, mask=there, other=0.0).to(tl.float32)
    if GUIDED:
        other = tl.load(at + lines.to(tl.int64) * V, mask=there, other=0.0).to(tl.float32)
        guided = other + weight * (guided - other)
    if HEATED:
        guided = tl.div_rn(guided, temperature)
    return tl.where(there, guided, float("-inf"))


@triton.jit
def _against(logits, peak):
    """Exponentials float64 of logits less their peak, zeros where all are -inf."""
    return tl.exp(logits - tl.where(peak == float("-inf"), 0.0, peak)).to(tl.float64)


@triton.jit(do_not_specialize=["lines"])
def weigh_chunks(
    logits,
    peaks,
    sums,
    lines,
    weight,
    temperature,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    GUIDED: tl.constexpr,
    HEATED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Peak of a tile of CHUNKS chunks of CHUNK logits, and the sum of exponentials of every chunk against it.

    Args:
        logits: [lines, V], conditional; with GUIDED as many unconditional ones behind them.
        peaks: float32 [lines, tiles].
        sums: float64 [lines, tiles CHUNKS].
        lines: number of draws.
        weight: of the guidance.
        temperature: divides the guided logits if HEATED.
        EARLY: wait for the kernel in front (programmatic dependent launch); none follows before that is done.
    """
    # What comes next has a whole pass behind it, see vgen.layers.early_launch.
    wait(EARLY)
    let_follow(EARLY)
    line, tile = tl.program_id(0), tl.program_id(1)
    chunk = tile * CHUNKS + tl.arange(0, CHUNKS)
    column = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    mine = _guided(logits, line, lines, column, column < V, weight, temperature, V, GUIDED, HEATED)
    peak = tl.max(tl.max(mine, 1), 0)
    at = line.to(tl.int64) * tl.num_programs(1) + tile
    tl.store(peaks + at, peak)
    tl.store(sums + at * CHUNKS + tl.arange(0, CHUNKS), tl.sum(_against(mine, peak), 1))


@triton.jit(
    do_not_specialize=["lines", "targets_sample", "targets_column", "uniform_sample", "decided", "copies_sample"]
)
def pick_in_chunks(
    logits,
    peaks,
    sums,
    uniform,
    targets,
    tokens,
    copies,
    lines,
    decided,
    uniform_sample,
    targets_sample,
    targets_column,
    copies_branch,
    copies_sample,
    weight,
    temperature,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
    ALL: tl.constexpr,
    BRANCHES: tl.constexpr,
    GUIDED: tl.constexpr,
    HEATED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The first token whose cumulative probability exceeds the uniform number: first its chunk, then its place there.

    Args:
        logits: as in :func:`weigh_chunks`, like peaks and sums, which it has written.
        uniform: float64 [B, order indices].
        targets: int64 [B, decided], order indices.
        tokens: int64 [lines], lines = B decided.
        copies: int64 [BRANCHES, B, n], where the token of target t of a sample goes to column t; the numbers named
            after it are its strides.
        uniform_sample: stride of the samples.
        targets_sample: likewise.
        targets_column: stride of the targets of a sample.
        TILES: number of tiles.
        ALL: number of chunks of all tiles, rounded up to a power of two.
        BRANCHES: copies to write; 0 = none.
        EARLY: as in :func:`weigh_chunks`.
    """
    let_follow(EARLY)
    # What was there before the kernel in front, which has waited, is not waited for.
    line = tl.program_id(0)
    sample, place = line // decided, line % decided
    target = tl.load(targets + sample * targets_sample + place * targets_column)
    number = tl.load(uniform + sample.to(tl.int64) * uniform_sample + target)
    wait(EARLY)

    chunk = tl.arange(0, ALL)
    real = chunk < TILES * CHUNKS
    tops = tl.load(peaks + line.to(tl.int64) * TILES + chunk // CHUNKS, mask=real, other=float("-inf"))
    top = tl.max(tops, 0)
    amount = tl.load(sums + line.to(tl.int64) * TILES * CHUNKS + chunk, mask=real, other=0.0)
    # A tile without a finite logit has sums of zero and a share of exp(-inf).
    amount *= tl.exp((tops - tl.where(top == float("-inf"), 0.0, top)).to(tl.float64))
    running = tl.cumsum(amount, 0)
    threshold = number * tl.max(running, 0)
    # Scans add in another order at every place: what holds nothing must not be taken for the last digit of a sum.
    chosen = tl.min(tl.where((running > threshold) & (amount > 0), chunk, ALL), 0)
    chosen = tl.where(chosen == ALL, tl.max(tl.where(amount > 0, chunk, 0), 0), chosen)
    before = tl.sum(tl.where(chunk < chosen, amount, 0.0), 0)

    peak = tl.load(peaks + line.to(tl.int64) * TILES + chosen // CHUNKS)
    column = chosen * CHUNK + tl.arange(0, CHUNK)
    mine = _guided(logits, line, lines, column, column < V, weight, temperature, V, GUIDED, HEATED)
    share = tl.exp((peak - tl.where(top == float("-inf"), 0.0, top)).to(tl.float64))
    mass = _against(mine, peak) * share
    token = tl.min(tl.where((before + tl.cumsum(mass, 0) > threshold) & (mass > 0), column, V), 0)
    token = tl.where(token == V, tl.max(tl.where(mass > 0, column, 0), 0), token)
    tl.store(tokens + line, token.to(tl.int64))
    for branch in tl.static_range(BRANCHES):
        tl.store(copies + branch * copies_branch + sample.to(tl.int64) * copies_sample + target, token.to(tl.int64))
