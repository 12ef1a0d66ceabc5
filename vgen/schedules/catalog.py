"""The orders under configs/schedule by name."""

from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_method

import vgen
from vgen.errors import UserError
from vgen.schedules.plan import Grid, Plan

FOLDER = Path(vgen.__file__).parents[1] / "configs" / "schedule"


def available() -> dict[str, str]:
    """Names of the orders under configs/schedule and the first comment line of each."""
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        first = path.read_text().splitlines()[0]
        found[path.stem] = first.removeprefix("#").strip() if first.startswith("#") else ""
    return found


def load_plan(name: str, grid: Grid, options: dict[str, Any]) -> Plan:
    """Build the plan of an order under configs/schedule.

    Args:
        name: file name without ending.
        grid: token grid.
        options: overrides of the file's entries, and num_condition.

    Raises:
        UserError: for an unknown order or option, or what the order itself refuses.
    """
    path = FOLDER / f"{name}.yaml"
    if name not in available():
        raise UserError(
            f"there is no schedule '{name}'; choose one of {', '.join(available()) or f'(none in {FOLDER})'}"
        )
    config = yaml.safe_load(path.read_text())
    schedule = partial(get_method(config.pop("_target_")), grid=grid)
    config.pop("_partial_", None)
    known = {*config, "num_condition"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UserError(f"schedule '{name}' has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    try:
        return schedule(**{**config, **options})
    except TypeError as error:
        raise UserError(f"schedule '{name}' cannot be built with {options}: {error}") from error


def decodable(trained: Plan) -> list[str]:
    """Names of the orders that decode a network trained with a plan: its own, and others with their files' options."""
    names = [trained.name]
    for name in available():
        try:
            plan = load_plan(name, trained.grid, {"num_condition": trained.num_condition})
        except UserError:
            continue
        if name != trained.name and plan.same_training(trained):
            names.append(name)
    return names
