"""Print or draw a decode order: python -m vgen.schedules NAME --grid 16x16 [key=value ...]."""

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

import torch
import yaml
from torch import Tensor

from vgen.errors import UserError
from vgen.random import keyed_permutation
from vgen.schedules.building import parse_grid
from vgen.schedules.catalog import FOLDER, available, load_plan
from vgen.schedules.check import check_plan
from vgen.schedules.plan import Kind, Plan

EDGE_ROWS = 24


def parse_options(words: list[str]) -> dict[str, Any]:
    """Turn key=value words into options; values are YAML.

    Raises:
        UserError: for a word without an equals sign or a value that is not YAML.
    """
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"'{word}' is not of the form key=value")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"the value of '{word}' is not readable YAML") from error
    return options


def contexts(plan: Plan) -> list[Tensor]:
    """Number of known tokens in the cache that each decided token is predicted from, int64 [D] per pass."""
    holds = torch.full((plan.num_rows,), -1)
    counts, decided = [], torch.arange(plan.num_tokens) < plan.num_known
    for forward in plan.forwards:
        kinds, feed = plan.kind[forward.slots], forward.feed
        own = plan.source[forward.slots]
        true = kinds == Kind.TOKEN
        true[kinds == Kind.TOKEN] = feed.tokens == own[kinds == Kind.TOKEN]
        true[kinds == Kind.TOKEN] &= decided[feed.tokens]
        holds[forward.rows] = torch.where(true, own, -1)
        known = holds[: forward.prefix] >= 0
        seen = known.expand(len(own), -1) if forward.mask is None else forward.mask & known
        union = torch.zeros(len(forward.targets), forward.prefix, dtype=torch.bool)
        for slots, targets in zip(forward.read.slots, forward.read.targets, strict=True):
            for slot, target in zip(slots.tolist(), targets.tolist(), strict=True):
                union[target] |= seen[slot]
        counts.append(union.sum(1))
        decided[forward.targets] = True
    return counts


def describe(plan: Plan) -> dict[str, Any]:
    """What the JSON output holds; ``steps`` lists the raster positions decided by each pass."""
    seen = contexts(plan)
    every = torch.cat(seen).float()
    decided = torch.tensor(plan.decided_before()).repeat_interleave(torch.tensor([len(one) for one in seen])).float()
    shares = every[decided > 0] / decided[decided > 0]
    return {
        "name": plan.name,
        "grid": list(plan.grid),
        "passes": len(plan.forwards),
        "steps": [plan.order[forward.targets].tolist() for forward in plan.forwards],
        "tokens": plan.num_tokens,
        "tokens_per_pass": plan.num_tokens / len(plan.forwards),
        "largest_pass": max(len(one) for one in seen),
        "slots_fed": sum(len(forward.slots) for forward in plan.forwards),
        "exact": plan.exact,
        "adaptive": plan.num_passes is None,
        "chosen_while_decoding": plan.policy is not None,
        "drawn_per_sample": plan.shuffled,
        "num_heads": plan.num_heads,
        "num_learned": plan.num_learned,
        "context_mean": every.mean().item(),
        "context_share": shares.mean().item() if len(shares) else 1.0,
    }


def example_of(plan: Plan) -> Plan:
    """The plan as one sample decodes it: an order drawn per sample is drawn once."""
    return replace(plan, order=keyed_permutation(plan.num_tokens, 0)) if plan.shuffled else plan


def print_text(plan: Plan) -> None:
    """Tables for people."""
    from rich.console import Console
    from rich.table import Table

    facts, console = describe(plan), Console(width=120)
    summary = Table(show_header=False, box=None)
    for label, value in (
        ("order", f"{facts['name']} on {'x'.join(map(str, plan.grid))}"),
        ("passes", f"{'at least ' if facts['adaptive'] else ''}{facts['passes']} for {facts['tokens']} tokens"),
        ("tokens per pass", f"{facts['tokens_per_pass']:.2f} on average, {facts['largest_pass']} at most"),
        (
            "visible context",
            f"{facts['context_mean']:.1f} tokens on average, {facts['context_share']:.1%} of the tokens decided before",
        ),
        ("decoding sees", _sees(plan)),
        ("network needs", _needs(plan)),
        ("order", _order(plan)),
    ):
        summary.add_row(label, value)
    console.print(summary)
    table = Table("pass", "slots fed", "tokens", "context", "raster positions decided", box=None)
    for index, (forward, seen) in enumerate(zip(plan.forwards, contexts(plan), strict=True)):
        if EDGE_ROWS <= index < len(plan.forwards) - EDGE_ROWS:
            if index == EDGE_ROWS:
                table.add_row("..", "", "", "", f"({len(plan.forwards) - 2 * EDGE_ROWS} passes, see --json)")
            continue
        low, high = int(seen.min()), int(seen.max())
        positions = plan.order[forward.targets].tolist()
        shown = " ".join(map(str, positions[:16])) + (" .." if len(positions) > 16 else "")
        context = str(low) if low == high else f"{low}-{high}"
        table.add_row(str(index), str(len(forward.slots)), str(len(seen)), context, shown)
    console.print(table)


def _order(plan: Plan) -> str:
    if plan.num_passes is not None and plan.policy is not None:
        return "chosen while decoding; the numbers of tokens are fixed, the positions are one example"
    if plan.policy is not None:
        return "chosen while decoding; the shortest run is shown"
    return "drawn for every sample; one example is shown" if plan.shuffled else "the same for every sample"


def _sees(plan: Plan) -> str:
    if plan.masking is not None:
        return "the known tokens at their places, of which training saw random sets"
    return "exactly what training saw" if plan.exact else "less than or other than what training saw"


def _needs(plan: Plan) -> str:
    needs = [f"{plan.num_heads} output head(s)", f"{plan.num_learned} learned embedding(s)"]
    if plan.has_queries:
        needs.append("position queries")
    elif plan.any_order:
        needs.append("to be told the place it predicts")
    if plan.masking is not None:
        needs.append("a mask token")
    return ", ".join(needs)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    listing = "\n".join(f"  {name:<14}{line}" for name, line in available().items())
    parser = argparse.ArgumentParser(
        prog="python -m vgen.schedules",
        description="Print or draw a decode order.",
        epilog=f"orders under {FOLDER}:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="which order")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the order, such as window=4")
    parser.add_argument("--grid", default="16x16", help="token grid, such as 16x16 or 4x16x16 (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON: name, grid, passes, steps, ..")
    parser.add_argument("--picture", metavar="FILE", help="draw the order into FILE; .gif animates it")
    given = parser.parse_intermixed_args(arguments)
    try:
        plan = load_plan(given.name, parse_grid(given.grid), parse_options(given.options))
        check_plan(plan)
        plan = example_of(plan)
        if given.picture:
            from vgen.schedules.picture import save_picture

            save_picture(plan, given.picture)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(describe(plan)))
    else:
        print_text(plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
