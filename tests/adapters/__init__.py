"""What the adapters of tests/parity.py share: a golden case, a comparison, and how tolerances are read.

An adapter is one file, tests/adapters/<system>.py, with a function `run(case: Case) -> list[Check]`; <system> is the
name of the folder that holds the cases. It decides what a case is from the case's content, and raises
`UnknownCase` for one it cannot run. Every tensor named out.* must be the subject of at least one check.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vgen.checkpoints.convert import difference


class UnknownCase(Exception):
    """No adapter knows how to run this case."""


@dataclass(frozen=True)
class Tolerance:
    """Allowed deviation: |got - want| <= atol + rtol * |want|; None where the case does not say."""

    atol: float | None = None
    rtol: float | None = None

    def allowed(self, want: Tensor) -> Tensor:
        """Allowed absolute deviation per element.

        A bare rtol is read against the tensor's largest value, because single elements may be as small as rounding
        noise; a bare atol gains the rounding of float32 itself.
        """
        if self.atol is None:
            return torch.full_like(want, (self.rtol or 0.0) * want.abs().max().item() if want.numel() else 0.0)
        return self.atol + (1e-6 if self.rtol is None else self.rtol) * want.abs()


EXACT = Tolerance(0.0, 0.0)


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: the out.* tensor it is about, without "out.", or a description.
        error: largest absolute deviation.
        ok: whether it is within the tolerance.
        note: what to say on failure.
    """

    name: str
    error: float
    ok: bool
    note: str = ""


@dataclass
class Case:
    """One golden case: a JSON file and, usually, a safetensors file beside it."""

    path: Path
    data: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Case":
        tensors = path.with_suffix(".safetensors")
        return cls(path, json.loads(path.read_text()), load_file(tensors) if tensors.exists() else {})

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def config(self) -> dict[str, Any]:
        return self.data.get("config", {})

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self._group("in.")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return self._group("out.")

    @cached_property
    def state(self) -> dict[str, Tensor]:
        return self._group("sd.")

    @property
    def is_manifest(self) -> bool:
        """Whether the JSON lists names and shapes of a published checkpoint."""
        return isinstance(self.data, dict) and "__file__" in self.data

    @property
    def manifest(self) -> dict[str, tuple[int, ...]]:
        """Published names and shapes."""
        return {name: tuple(shape) for name, shape in self.data.items() if not name.startswith("__")}

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Entries of the state dict below a prefix, without it."""
        return {name[len(prefix) :]: value for name, value in self.state.items() if name.startswith(prefix)}

    def _group(self, prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}

    def tolerance(self, *topics: str, default: Tolerance) -> Tolerance:
        """Tolerance the case states for a topic.

        Args:
            topics: words to look for, best first, in the case's segments ("gradients atol 1e-5; losses ...").
            default: when no segment with numbers mentions one; then the only segment without a topic would still win.
        """
        stated = self.data.get("tolerance", "")
        segments = [f"{k}: {v}" for k, v in stated.items()] if isinstance(stated, Mapping) else str(stated).split(";")
        for topic in topics:
            for segment in segments:
                if topic.lower() in segment.lower():
                    return _numbers(segment) or default
        if len(segments) == 1:
            return _numbers(segments[0]) or default
        return default

    def compare(self, name: str, got: Tensor | float | bool, tolerance: Tolerance) -> Check:
        """Compare with the golden tensor out.<name>."""
        return compare(name, got, self.outputs[name], tolerance)


def _numbers(text: str) -> Tolerance | None:
    found = {kind: float(value) for kind, value in re.findall(r"(atol|rtol)\s*=?\s*([0-9.]+(?:e[-+]?\d+)?)", text)}
    if found:
        return Tolerance(found.get("atol"), found.get("rtol"))
    return EXACT if "exact" in text else None


def compare(name: str, got: Tensor | float | bool, want: Tensor, tolerance: Tolerance) -> Check:
    """Compare a tensor with its golden value; shapes must agree and NaN never passes."""
    got = torch.as_tensor(got).detach().cpu()
    if got.shape != want.shape:
        return Check(name, math.inf, False, f"shape {list(got.shape)} instead of {list(want.shape)}")
    want, got = want.double(), got.double()
    if not want.numel():
        return Check(name, 0.0, True)
    error = (got - want).abs()
    error[got == want] = 0.0
    ok = bool((error <= tolerance.allowed(want)).all())
    worst = error.max().item()
    return Check(name, worst, ok, "" if ok else f"largest value {want.abs().max().item():.3g}, {tolerance}")


def compare_all(case: Case, got: Mapping[str, Tensor], tolerance: Tolerance) -> list[Check]:
    """Compare several outputs under one tolerance; only those the case holds."""
    return [case.compare(name, value, tolerance) for name, value in got.items() if name in case.outputs]


def compare_manifest(case: Case, published: Mapping[str, Tensor], parameters: int) -> list[Check]:
    """Compare a network (on the meta device, under published names) with a manifest, both ways.

    Args:
        case: the manifest.
        published: our state dict under the published names.
        parameters: our number of parameters.
    """
    shapes = {name: tuple(value.shape) for name, value in published.items()}
    problems = difference(case.manifest, shapes)
    checks = [Check("names and shapes", float(bool(problems)), not problems, problems)]
    header = case.data["__file__"] if isinstance(case.data["__file__"], Mapping) else {}
    stated = header.get("parameters", header.get("num_params", header.get("params", case.data.get("__parameters__"))))
    if stated is not None:
        checks.append(Check("parameters", abs(parameters - stated), parameters == stated, f"{parameters} not {stated}"))
    elements = header.get("state_dict_elements")
    if elements is not None:
        ours = sum(value.numel() for value in published.values())
        checks.append(Check("elements", abs(ours - elements), ours == elements, f"{ours} not {elements}"))
    return checks


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def uncompared(case: Case, checks: Iterable[Check]) -> list[str]:
    """Outputs of a case that no check was about."""
    return sorted(set(case.outputs) - {check.name for check in checks})
