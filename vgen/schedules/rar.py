"""RAR order: raster decoding by a network that learned every order, randomness annealed away while it trained."""

import math
from collections.abc import Sequence
from dataclasses import replace

from vgen.errors import UserError
from vgen.schedules.building import check_grid
from vgen.schedules.plan import Plan, RandomOrder
from vgen.schedules.raster import raster
from vgen.schedules.scans import scan_order


def rar(
    *,
    grid: Sequence[int],
    num_condition: int = 1,
    scan: str = "raster",
    anneal_start: float | None = None,
    anneal_end: float | None = None,
) -> Plan:
    """Plan of randomized autoregressive modeling (RAR, arXiv 2411.00776, section 3).

    Slots as in raster order, one token per pass along ``scan``. A sample is trained in a random order with a
    probability that is 1 up to ``anneal_start``, falls linearly and is 0 from ``anneal_end`` on; the other samples, and
    decoding, follow the scan. The network must be told the place of the token it predicts
    (``generator.positions=own_target``), so that any scan is a legal order for the same weights; a network whose
    training ended with one scan decodes best by it.

    Args:
        grid: token grid of one to three axes.
        num_condition: number of condition slots (2 for published RAR weights).
        scan: a name of :data:`vgen.schedules.scans.SCANS`.
        anneal_start: optimizer step; null = never, every order stays random.
        anneal_end: optimizer step; null = never.

    Raises:
        UserError: for an unknown scan, or steps that are not in order.
    """
    sides = check_grid(grid, num_condition)
    start = math.inf if anneal_start is None else float(anneal_start)
    end = math.inf if anneal_end is None else float(anneal_end)
    if not 0 <= start <= end or (start < end == math.inf):
        raise UserError(
            f"schedule.anneal_start={anneal_start}, anneal_end={anneal_end} must be steps with 0 <= start <= end, or "
            "both null"
        )
    return replace(
        raster(grid=sides, num_condition=num_condition),
        name="rar",
        order=scan_order(scan, sides, key="schedule.scan"),
        any_order=True,
        random_order=RandomOrder(start, end),
    )
