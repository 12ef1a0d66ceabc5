"""ZipAR: rows of a raster-trained model decoded side by side, each a window behind the row above; no training."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from vgen.errors import UserError
from vgen.schedules.adaptive import AdaptiveRows
from vgen.schedules.building import Step, check_grid, make_plan
from vgen.schedules.plan import Plan
from vgen.schedules.raster import raster


def zipar(
    *,
    grid: Sequence[int],
    num_condition: int = 1,
    window: int = 8,
    adaptive: bool = False,
    cache: Literal["strict", "original"] = "strict",
    overlap_first_row: bool = False,
) -> Plan:
    """Plan of ZipAR (arXiv 2412.04062, ICML 2025), for networks trained in raster order.

    A row starts once the row above has ``window`` tokens; all running rows then advance by one token per pass. The slot
    that predicts a row's first token is the last one of the row above, which is not known yet: it is fed a provisional
    token instead, the newest known one of the row two above (of the row above for the second row), and fed again with
    the true token in the pass after that is decided. Passes: 2 W + (H - 2) window, or W + (H - 1) window if the first
    row overlaps; a window that spans the row is the raster order. On T x H x W grids frame after frame is decoded this
    way, in T times as many passes.

    Args:
        grid: token grid (H, W) or (T, H, W).
        num_condition: number of condition slots.
        window: tokens the row above is ahead, >= 1; the smallest number where it is adaptive.
        adaptive: the first token of a row is drawn at ``window`` and accepted only when one more token of the row above
            does not change it (:class:`vgen.schedules.adaptive.AdaptiveRows`); at least 2 W + (H - 2) (window + 1)
            passes.
        cache: ``strict``: a slot sees itself and known tokens only. ``original``: as the published decoder, a slot
            attends to every cache row up to its own, to provisional tokens and to rows nobody has written (zero keys
            and values, which dilute the softmax); not what the network was trained on.
        overlap_first_row: start the second row while the first is decoded (the published decoder does not).

    Raises:
        UserError: for a grid of another number of axes, a window below 1, an unknown cache mode, or an adaptive window
            with the original's cache or on more than one frame.
    """
    sides = check_grid(grid, num_condition)
    if len(sides) not in (2, 3):
        raise UserError(
            f"schedule 'zipar' decodes the rows of a picture side by side; the grid {sides} is not (H, W) or (T, H, W)"
        )
    if window < 1:
        raise UserError(f"schedule.window={window} must be at least 1 (the number of columns or more is plain raster)")
    if cache not in ("strict", "original"):
        raise UserError(f"schedule.cache={cache} must be strict or original")
    if adaptive and cache != "strict":
        raise UserError("schedule.adaptive needs schedule.cache=strict: the original decoder has no adaptive window")
    frames, height, width = (1, *sides)[-3:]
    if adaptive and frames > 1:
        raise UserError("schedule.adaptive knows no frames; take schedule.adaptive=false on a (T, H, W) grid")
    trained = raster(grid=sides, num_condition=num_condition)
    if adaptive and window < width and height > 1:
        return _adaptive(trained, window, overlap_first_row)
    rows_of_frame = [0] + [(0 if overlap_first_row else width - window) + row * window for row in range(1, height)]
    if window >= width or rows_of_frame[-1] == (height - 1) * width:
        return replace(trained, name="zipar")

    passes = rows_of_frame[-1] + width
    starts = [frame * passes + start for frame in range(frames) for start in rows_of_frame]
    steps = [_step(index, starts, width, height, num_condition) for index in range(frames * passes)]
    if cache == "original":
        rows = torch.arange(num_condition + frames * height * width - 1)
        steps = [replace(step, visible=rows <= torch.tensor(step.slots)[:, None]) for step in steps]
    return make_plan(
        name="zipar",
        grid=sides,
        num_condition=num_condition,
        order=trained.order,
        kind=trained.kind,
        source=trained.source,
        position=trained.position,
        target=trained.target,
        level_q=trained.level_q,
        level_k=trained.level_k,
        reads=trained.reads,
        steps=steps,
        exact=False,
    )


def _adaptive(trained: Plan, window: int, overlap_first_row: bool) -> Plan:
    """Rows that start when their first token is accepted; the passes shown are those of a run that never rejects."""
    height, width = trained.grid[-2:]
    rows = AdaptiveRows(height, width, window, trained.num_condition, overlap_first_row)
    shortest = zipar(
        grid=trained.grid,
        num_condition=trained.num_condition,
        window=window + 1,
        overlap_first_row=overlap_first_row,
    )
    return replace(shortest, exact=False, num_rows=rows.num_rows, policy=rows)


def _step(index: int, starts: list[int], width: int, height: int, num_condition: int) -> Step:
    """What a pass feeds and decides.

    Args:
        index: number of the pass.
        starts: pass that decides the first token of each row, frame by frame.
        width: tokens per row.
        height: rows per frame.
        num_condition: number of condition slots.
    """
    columns = {row: index - start for row, start in enumerate(starts) if 0 <= index - start < width}
    targets = [row * width + column for row, column in columns.items()]
    if index == 0:
        return Step(range(num_condition), targets)
    # The true last token of a row that the previous pass completed, then what feeds each running row.
    completed = [(row + 1) * width - 1 for row, start in enumerate(starts) if index == start + width]
    sources = {token: token for token in completed}
    for row, column in columns.items():
        token = row * width + column - 1
        sources.setdefault(token, token if column > 0 else _provisional(row, starts, width, height))
    tokens = sorted(sources)
    return Step([num_condition + token for token in tokens], targets, sources=[sources[token] for token in tokens])


def _provisional(row: int, starts: list[int], width: int, height: int) -> int:
    """The known token that stands in for the last one of the row above when a row starts."""
    above = max(row - 2, row // height * height)
    known = min(width, starts[row] - starts[above])
    return above * width + known - 1
