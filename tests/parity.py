"""Run golden cases through our own code: python tests/parity.py DIR...

Each DIR holds the cases of one system (JSON, usually with a safetensors file beside it); its name picks the adapter
tests/adapters/<name>.py. One line per case: name, largest error, ok or FAIL. The exit status is 1 if a case failed, is
unknown to its adapter, or compares only a part of its outputs.
"""

import argparse
import importlib
import importlib.util
import json
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

# The code of this checkout is compared, not that of an installed vgen. The adapters are found however this file is
# started, as a script or by the test suite, but behind everything else: tests/tokenizers must not hide a library.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parent))

from adapters import Case, Check, UnknownCase, uncompared


@dataclass(frozen=True)
class Verdict:
    """Outcome of one case."""

    system: str
    name: str
    checks: list[Check]
    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        worst = max(self.checks, key=lambda check: check.error, default=None)
        error = f"max error {worst.error:.3e} ({worst.name})" if worst else "nothing compared"
        line = f"{self.system}/{self.name:<28} {error:<60} {'ok' if self.ok else 'FAIL'}"
        return line if self.ok else f"{line}: {'; '.join(self.problems)}"


def find_cases(folder: Path) -> list[Path]:
    """JSON files of a folder, and safetensors files that lack one."""
    found = set(folder.glob("*.json"))
    found |= {path.with_suffix(".json") for path in folder.glob("*.safetensors")}
    return sorted(found)


def run_case(path: Path) -> Verdict:
    """Run one case through the adapter named after its folder; never raises for what the case or adapter does."""
    system, checks = path.resolve().parent.name, []
    try:
        case = Case.read(path)
        if importlib.util.find_spec(f"adapters.{system}") is None:
            raise UnknownCase(f"there is no adapter tests/adapters/{system}.py")
        torch.manual_seed(0)
        checks = importlib.import_module(f"adapters.{system}").run(case)
        problems = [f"{check.name} off by {check.error:.3e} ({check.note})" for check in checks if not check.ok]
        missed = uncompared(case, checks)
        if missed:
            problems.append(f"not compared: {', '.join(missed)}")
        if not checks:
            problems.append("the adapter compared nothing")
    except UnknownCase as error:
        problems = [f"unknown case ({error})"]
    except (OSError, json.JSONDecodeError) as error:
        problems = [f"unreadable ({error})"]
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        problems = [f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"]
    return Verdict(system, path.stem, checks, problems)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    failed = total = 0
    for folder in parser.parse_args(arguments).folders:
        paths = find_cases(folder)
        if not paths:
            print(f"{folder}: FAIL: no golden case found there")
            failed += 1
        for path in paths:
            verdict = run_case(path)
            print(verdict, flush=True)
            total, failed = total + 1, failed + (not verdict.ok)
    print(f"{total} cases, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
