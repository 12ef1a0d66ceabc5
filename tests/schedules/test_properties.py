"""Properties of every order on drawn grids and options."""

from math import prod
from typing import get_args

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.schedules.helpers import ORDERS, same_plan
from vgen.schedules.catalog import load_plan
from vgen.schedules.check import check_plan
from vgen.schedules.masking import Ratio
from vgen.schedules.scans import SCANS

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
side = st.integers(1, 9)
grids = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(side, side),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
)
pictures = st.tuples(st.integers(2, 9), st.integers(2, 9))


@st.composite
def cases(draw):
    """An order, a grid it accepts, and options."""
    name = draw(st.sampled_from(ORDERS))
    options = {"num_condition": draw(st.integers(1, 3))}
    grid = draw(grids)
    if name == "zipar":
        grid = draw(pictures)
        options |= {"window": draw(st.integers(1, 10)), "overlap_first_row": draw(st.booleans())}
        options["adaptive"] = draw(st.booleans())
    elif name == "parallel":
        rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        height, width = rows * draw(st.integers(1, 3)), columns * draw(st.integers(1, 3))
        grid = draw(st.sampled_from([(height, width), (2, height, width)]))
        options["regions"] = [rows, columns]
    elif name == "diagonal":
        grid = draw(st.one_of(pictures, st.tuples(st.integers(1, 3), side, side)))
        options["first"] = draw(st.sampled_from(["right", "down"]))
    elif name == "randar":
        options["steps"] = draw(st.one_of(st.none(), st.integers(1, prod(grid))))
        options["num_known"] = draw(st.integers(0, prod(grid) - 1))
        options["order"] = draw(st.sampled_from(["random", "raster"]))
    elif name in ("masked", "masked_random"):
        options["steps"] = draw(st.integers(1, prod(grid)))
        options["ratio"] = draw(st.sampled_from(get_args(Ratio)))
    elif name == "rar" and len(grid) > 1:
        options["scan"] = draw(st.sampled_from(sorted(SCANS)))
    return name, grid, options


@given(cases())
@quick
def test_the_contract_holds(case):
    name, grid, options = case
    plan = load_plan(name, grid, options)
    check_plan(plan)
    decided = torch.cat([forward.targets for forward in plan.forwards])
    assert len(decided) + plan.num_known == plan.num_tokens
    assert plan.decided_before()[0] == plan.num_known
    assert plan.same_training(load_plan(name, grid, options))


@given(cases())
@quick
def test_settled_rows_are_those_in_front_of_all_that_a_pass_writes(case):
    for forward in load_plan(*case).forwards:
        # The attention reads these before the kernel that writes the rows of this pass has ended.
        assert forward.settled == min([*forward.rows.flatten().tolist(), forward.prefix])


@given(cases())
@quick
def test_reads_by_target_are_the_reads(case):
    plan = load_plan(*case)
    for forward in plan.forwards:
        read, decided = forward.read, forward.targets.shape[-1]
        once = all(len(targets) == len(set(targets.tolist())) for targets in read.targets)
        assert bool(read.sources) == once
        total = torch.zeros(decided)
        for head, (source, share) in enumerate(zip(read.sources, read.shares, strict=True)):
            there = source >= 0
            order = read.targets[head].argsort()
            assert torch.equal(there.nonzero()[:, 0], read.targets[head][order])
            assert torch.equal(source[there], read.slots[head][order])
            assert torch.equal(share[there], read.weights[head][order])
            total += share
        assert not once or torch.allclose(total, torch.ones(decided))


@given(cases())
@quick
def test_passes_follow_the_closed_forms(case):
    name, grid, options = case
    passes, tokens = len(load_plan(name, grid, options).forwards), prod(grid)
    if name in ("raster", "diagonal", "rar"):
        assert passes == tokens
    elif name in ("masked", "masked_random"):
        assert passes == options["steps"]
    elif name == "neighboring":
        assert passes == sum(grid) - len(grid) + 1
    elif name == "parallel":
        regions = prod(options["regions"])
        assert passes == (tokens if tokens == regions else regions - 1 + tokens // regions)
    elif name == "randar":
        left, steps = tokens - options["num_known"], options["steps"]
        assert passes == (left if steps is None or steps >= left else max(2, steps))
    elif name == "zipar":
        height, width = grid
        window = options["window"] + (1 if options["adaptive"] and options["window"] < width else 0)
        first = 0 if options["overlap_first_row"] else width - min(window, width)
        assert passes == width + min((height - 1) * window + first, (height - 1) * width)


@given(grids, st.integers(1, 3))
@quick
def test_groups_of_one_are_raster(grid, num_condition):
    plain = load_plan("raster", grid, {"num_condition": num_condition})
    options = {"num_condition": num_condition}
    if len(grid) == 1:
        assert same_plan(load_plan("neighboring", grid, options), plain)
    else:
        assert same_plan(load_plan("parallel", grid, {**options, "regions": 1}), plain)
    if len(grid) == 2:
        assert same_plan(load_plan("zipar", grid, {**options, "window": grid[1]}), plain)
    scan = load_plan("rar", grid, options)
    assert torch.equal(scan.order, plain.order)
    assert len(scan.forwards) == len(plain.forwards)
