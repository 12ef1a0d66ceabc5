"""Imports point one way through the house; networks load without Lightning."""

import ast
import subprocess
import sys

import pytest

from tests.paths import ROOT

ORDER = [
    "schedules",
    "layers",
    "tokenizers",
    "generators",
    "data",
    "losses",
    "sampling",
    "checkpoints",
    "evaluation",
    "training",
]
COMMON = {path.stem for path in (ROOT / "vgen").glob("*.py")}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(module):
    names = module.split(".")
    return names[1] if names[0] == "vgen" and len(names) > 1 else None


@pytest.mark.parametrize("path", sorted((ROOT / "vgen").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_earlier_folders(path):
    parts = path.relative_to(ROOT / "vgen").parts
    mine = ORDER.index(parts[0]) if len(parts) > 1 else -1
    for module in imports(path):
        part = part_of(module)
        if part in ORDER:
            assert ORDER.index(part) <= mine, f"{path.name} imports {module}"
        elif part is not None:
            assert part in COMMON | {"__version__"}, f"{module} belongs to no known folder"
        if module.split(".")[0] in ("pytorch_lightning", "lightning"):
            assert parts[0] == "training", f"{path.name} imports Lightning"


def test_every_folder_is_in_the_order():
    folders = {path.parent.name for path in (ROOT / "vgen").glob("*/__init__.py")}
    assert folders <= set(ORDER)


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_scripts_are_thin(script):
    assert len((ROOT / script).read_text().splitlines()) < 60


def test_sampling_does_not_load_lightning_or_optional_libraries():
    heavy = ["pytorch_lightning", "sklearn", "matplotlib", "pyarrow", "torch_fidelity", "wandb"]
    code = f"import sys, vgen.checkpoints.sampling_job; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
