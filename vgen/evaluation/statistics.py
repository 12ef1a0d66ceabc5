"""Statistics of a picture or clip set on disk: what a later job needs instead of the set itself.

The layout is that of the ADM suite's reference batches (``mu``, ``sigma``, ``mu_s``, ``sigma_s``), so that published
files can be read and other tools can read ours; ``n``, ``factor`` and ``meta_json`` are additions.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.evaluation.frechet import Gaussian


@dataclass(frozen=True)
class SetStatistics:
    """Gaussian fits of a set.

    Attributes:
        pool: fit of the pooled features (Inception 2048, I3D logits, ...).
        spatial: fit of the spatial features of sFID, if they were collected.
        meta: how they were made: extractor, layer, resize and what else must agree with the other side of a distance.
            Empty for files of other tools, which do not say.
    """

    pool: Gaussian
    spatial: Gaussian | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def _arrays(fit: Gaussian, suffix: str) -> dict[str, np.ndarray]:
    arrays = {f"mu{suffix}": fit.mean.numpy(), f"sigma{suffix}": fit.covariance.numpy()}
    if fit.factor is not None:
        arrays[f"factor{suffix}"] = fit.factor.numpy()
    return arrays


def save_statistics(path: Path, statistics: SetStatistics) -> Path:
    """Write statistics as .npz in one step: a reader sees the old file or the new one, never a part.

    Raises:
        UserError: if the file cannot be written.
    """
    arrays = _arrays(statistics.pool, "")
    if statistics.spatial is not None:
        arrays |= _arrays(statistics.spatial, "_s")
    meta = json.dumps({**statistics.meta, "ddof": statistics.pool.ddof}, sort_keys=True)
    arrays |= {"n": np.array(statistics.pool.count), "meta_json": np.array(meta)}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"statistics cannot be written to {path} ({error.strerror}); choose another place") from error
    return path


def _fit(path: Path, arrays: Mapping[str, np.ndarray], suffix: str, count: int, ddof: int) -> Gaussian:
    mean, covariance = (torch.from_numpy(arrays[f"{key}{suffix}"]).double() for key in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{path}: mu{suffix} has shape {list(mean.shape)} and sigma{suffix} {list(covariance.shape)}; expected [d] "
            f"and [d, d]"
        )
    if not bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise UserError(f"{path}: mu{suffix} or sigma{suffix} holds NaN or infinite values; get the file again")
    factor = arrays.get(f"factor{suffix}")
    symmetric = (covariance + covariance.T) / 2
    return Gaussian(count, mean, symmetric, None if factor is None else torch.from_numpy(factor), ddof)


def has_statistics(path: Path) -> bool:
    """Whether a file is an .npz archive that holds ``mu`` and ``sigma``."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def load_statistics(path: Path, *, expected: Mapping[str, Any] | None = None) -> SetStatistics:
    """Read statistics: our own, an ADM reference batch, or a plain {mu, sigma} file (pytorch-fid, EDM, MAR).

    Args:
        path: .npz file.
        expected: what the meta data must say (extractor, resize, ddof, ...). Keys the file does not state are not
            checked: files of other tools state nothing.

    Raises:
        UserError: if the file is missing, damaged, of another layout, or was made with other conventions.
    """
    if not path.is_file():
        raise UserError(f"statistics {path} do not exist; give an .npz file with mu and sigma")
    names = ("mu", "sigma", "mu_s", "sigma_s", "factor", "factor_s", "n", "meta_json")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in names if name in archive.files}
            found = ", ".join(archive.files)
        meta = json.loads(str(arrays["meta_json"])) if "meta_json" in arrays else {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"statistics {path} cannot be read ({error}); the file may be truncated") from error
    if not {"mu", "sigma"} <= set(arrays):
        raise UserError(f"{path} holds no statistics mu and sigma (it holds: {found})")
    wrong = {key: value for key, value in (expected or {}).items() if key in meta and meta[key] != value}
    if wrong:
        told = "; ".join(f"{key} is {meta[key]} there and {value} here" for key, value in wrong.items())
        raise UserError(f"statistics {path} were made with other conventions: {told}; compute them again")
    count, ddof = int(arrays.get("n", np.array(0))), int(meta.get("ddof", 1))
    pool = _fit(path, arrays, "", count, ddof)
    spatial = _fit(path, arrays, "_s", count, ddof) if {"mu_s", "sigma_s"} <= set(arrays) else None
    return SetStatistics(pool, spatial, meta)


def content_hash(parts: Iterable[Path | Tensor | np.ndarray | str]) -> str:
    """SHA-256 over the bytes of files, arrays and names, in the given order.

    Of a folder give its files (relative names and paths), of an array its blocks. Two sets have one hash only if every
    byte that decides the pictures is equal; a path or a date of change plays no part.

    Raises:
        UserError: naming a file that cannot be read.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            try:
                with part.open("rb") as file:
                    inner = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise UserError(f"{part} cannot be read ({error.strerror})") from error
            digest.update(b"file" + inner.encode())
        elif isinstance(part, str):
            digest.update(b"name" + json.dumps(part).encode())
        else:
            array = part.cpu().numpy() if isinstance(part, Tensor) else part
            digest.update(f"array{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class StatisticsCache:
    """Statistics of reference sets, found again by what they were computed from.

    The name of an entry is a hash of the set's content and of every convention, never of a path: another extractor,
    resize, subset or pixel gives another entry.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, content: str, meta: Mapping[str, Any]) -> Path:
        """Where the statistics of a set are kept.

        Args:
            content: :func:`content_hash` of the set.
            meta: conventions, as in :class:`SetStatistics`.
        """
        key = json.dumps({"content": content, **meta}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"

    def get(self, content: str, meta: Mapping[str, Any]) -> SetStatistics | None:
        """Statistics stored before, None if there are none (or the file is damaged, which only costs time)."""
        path = self.path(content, meta)
        if not path.is_file():
            return None
        try:
            return load_statistics(path, expected=meta)
        except UserError:
            return None

    def put(self, content: str, statistics: SetStatistics) -> Path:
        """Store statistics under the content hash and their own ``meta``."""
        return save_statistics(self.path(content, statistics.meta), statistics)
