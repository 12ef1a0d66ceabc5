"""Strict loading of state dicts, ours and published ones."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vgen.errors import UserError

StateDict = dict[str, Tensor]


def read_weights(path: str | Path) -> Any:
    """Read a weight file without running code from it.

    Args:
        path: a ``.safetensors`` file, or a file written by ``torch.save`` that loads with ``weights_only=True``.

    Returns:
        What the file holds, on the CPU.

    Raises:
        UserError: if the file is missing, truncated or holds anything but tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no weight file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, LookupError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read ({reason}); it is truncated, damaged or not a plain weight file: copy it again"
        ) from error


def unwrap(content: Any, *, keys: tuple[str, ...], path: str | Path) -> StateDict:
    """Find the state dict in what a published file holds.

    Args:
        content: what :func:`read_weights` returned.
        keys: names under which the state dict may be nested, best first.
        path: for messages.

    Raises:
        UserError: if no flat state dict is found.
    """
    for key in keys:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict, neither at the top nor under {', '.join(keys)}")
    return dict(content)


def rename(state: StateDict, prefixes: Mapping[str, str]) -> StateDict:
    """Replace key prefixes; the first matching prefix counts."""
    renamed = {}
    for name, value in state.items():
        for old, new in prefixes.items():
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        renamed[name] = value
    return renamed


def load_strict(module: nn.Module, state: StateDict, *, what: str) -> None:
    """Load a state dict, refusing any difference in names or shapes.

    Raises:
        UserError: listing what is missing, unknown and of another shape.
    """
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    problems = difference(expected, given)
    if problems:
        raise UserError(f"{what} does not fit the configured network: {problems}")
    module.load_state_dict(state)


def difference(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> str:
    """One line naming how two sets of names and shapes differ, empty if they do not."""
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected]
    shapes = [
        f"{name} {list(given[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    parts = []
    for label, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes)):
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            parts.append(f"{len(names)} {label}: {shown}")
    return "; ".join(parts)
