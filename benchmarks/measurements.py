"""Measurements in an output folder: rows that are kept as soon as they are known, and the settings that they share."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vgen.errors import UserError


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    """Finished measurements of a kind; half a row, left by a kill, does not count."""
    path, found = out / f"{name}.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def add(out: Path, name: str, row: Mapping[str, Any]) -> None:
    """Keep a measurement."""
    with (out / f"{name}.jsonl").open("ab+") as file:
        # Behind half a row a new line begins, or both would be lost.
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
    print(json.dumps(row), flush=True)


def check_same(out: Path, settings: Mapping[str, Any], *, later: Sequence[str] = ()) -> None:
    """Refuse to go on with other settings in the same folder: the rows would not be comparable.

    Args:
        out: folder of the rows, which keeps the settings in settings.json.
        settings: those of this call.
        later: settings that may be empty at first and be given later; what needs them is done then.

    Raises:
        UserError: naming the settings that differ.
    """
    mine, path = dict(settings), out / "settings.json"
    theirs = json.loads(path.read_text()) if path.is_file() else mine
    filled = theirs | {name: theirs.get(name) or mine[name] for name in later}
    if other := [name for name in mine if filled.get(name) != mine[name]]:
        raise UserError(f"{path} has other {', '.join(other)}; choose another --out or the same values")
    if mine != theirs or not path.is_file():
        # In one step: several processes of one comparison read it at once.
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(mine, indent=1))
        partial.replace(path)
