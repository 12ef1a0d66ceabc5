"""Worked examples of DAR's zig-zag scan, in our convention, and of its guidance schedule."""

import torch
from adapters import Case, Check, Tolerance, UnknownCase, compare
from adapters.orders import same
from torch import Tensor

from vgen.generators.embedding import Directions
from vgen.generators.places import Places
from vgen.layers.rope import Rotary, grid_coordinates, rope_table
from vgen.sampling.settings import Guidance
from vgen.schedules.diagonal import diagonal
from vgen.schedules.moves import moves_of
from vgen.schedules.plan import Plan

WEIGHTS, ANGLES = Tolerance(2e-6, 0.0), Tolerance(2e-6, 0.0)


def run(case: Case) -> list[Check]:
    """Find out what a case is from its content and run it."""
    if "scan_raster_index" in case.data:
        return run_scan(case)
    if "cases" in case.data and all({"power", "values"} <= set(one) for one in case.data["cases"]):
        return run_guidance(case)
    raise UnknownCase("neither a scan nor a guidance table")


def run_scan(case: Case) -> list[Check]:
    """Order, inverse, and what every slot knows of its own place and of the next."""
    data = case.data
    plan = diagonal(grid=data["grid"], first=data.get("first", "right"))
    places = grid_coordinates(plan.grid)[plan.order]
    checks = [
        same("num_tokens", plan.num_tokens, data["num_tokens"]),
        same("num_slots", plan.num_slots, data["num_slots"]),
        same("forwards", len(plan.forwards), data["num_forwards_one_token_per_step"]),
        same("scan", plan.order.tolist(), data["scan_raster_index"]),
        same("coordinates", places.tolist(), data["scan_coords"]),
        same("inverse", plan.order.argsort().tolist(), data["inverse"]),
    ]
    current = torch.where(plan.position[:, None] >= 0, places[plan.position], 0)
    following = places[plan.target]
    checks.append(same("coords4d", torch.cat([current, following], 1).tolist(), data["coords4d_per_slot"]))
    stated = [data["direction_ids"][str(number)]["delta_row_col"] for number in range(1, len(data["direction_ids"]))]
    module = Directions(grid=plan.grid, moves=stated, dim=2)
    slots = Places.of(plan.on(torch.device("cpu")).feed, plan.order)
    directions = module.number(slots.own, slots.target).tolist()
    checks.append(same("directions", directions, data["direction_id_per_slot"]))
    if min(plan.grid) > 2:
        checks.append(same("numbering", [list(move) for move in moves_of(plan)], stated))
    counts = {entry["name"]: directions.count(int(number)) for number, entry in data["direction_ids"].items()}
    checks.append(same("direction_counts", counts, data["direction_counts"]))
    return [*checks, *_rope(plan, data["rope4d"])]


def _rope(plan: Plan, stated: dict) -> list[Check]:
    """Half of the head turns by the current place, half by the next."""
    rotary = Rotary(
        kind="own_target",
        grid=plan.grid,
        head_dim=stated["head_dim"],
        base=stated["base"],
        placeless="identity",
        axes=None,
    )
    slots = Places.of(plan.on(torch.device("cpu")).feed, plan.order)
    got = rotary(slots.own, slots.target)
    angles = torch.tensor(stated["angles"], dtype=torch.float64)
    return [compare("rope4d", got, torch.stack([angles.cos(), angles.sin()], -1), ANGLES), *_frequencies(stated)]


def _frequencies(stated: dict) -> list[Check]:
    table = rope_table((2, 2), stated["head_dim"] // 2, base=stated["base"])
    cosines: Tensor = table[2, : len(stated["freqs_per_axis"]), 0]
    want = torch.tensor(stated["freqs_per_axis"], dtype=torch.float64).cos()
    return [compare("frequencies", cosines, want, ANGLES)]


def run_guidance(case: Case) -> list[Check]:
    """Power-cosine weights."""
    checks = []
    for index, one in enumerate(case.data["cases"]):
        guidance = Guidance(scale=one["scale"], schedule="power-cosine", power=one["power"])
        got = torch.tensor([guidance.weight(t, one["N"]) for t in range(one["N"])], dtype=torch.float64)
        checks.append(compare(f"case {index}", got, torch.tensor(one["values"], dtype=torch.float64), WEIGHTS))
    return checks
