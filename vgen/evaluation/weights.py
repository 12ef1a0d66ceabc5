"""Published weight files of the metrics: how they are called, where they are looked for, how they are checked.

Nothing is downloaded. A job looks for all it needs before it starts and stops, naming every file that is missing.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from vgen.checkpoints.release import file_sha256
from vgen.errors import UserError

WEIGHTS_VARIABLE = "VGEN_WEIGHTS"
WRONG_FILES = {
    "inception_v3_google-0cc3c7bd.pth": "torchvision's Inception, another network than the one FID is defined with",
}


@dataclass(frozen=True)
class WeightFile:
    """A published weight file.

    Attributes:
        what: network and the metrics that need it.
        names: under which the file is known, the first one preferred.
        source: where people get it.
        option: configuration key that names a file or folder.
        sha256: leading hex digits of its SHA-256, None if not known.
        git_blob: SHA-1 of the file as a git object, None if not known.
        md5: None if not known.
    """

    what: str
    names: tuple[str, ...]
    source: str
    option: str
    sha256: str | None = None
    git_blob: str | None = None
    md5: str | None = None

    @property
    def hashed(self) -> bool:
        """Whether a hash of it is known."""
        return any((self.sha256, self.git_blob, self.md5))

    @property
    def hash_text(self) -> str:
        """How the file is recognised, for messages."""
        if self.sha256:
            return f"SHA-256 {'starts with ' if len(self.sha256) < 64 else ''}{self.sha256}"
        if self.git_blob:
            return f"git blob {self.git_blob}"
        return f"MD5 {self.md5}" if self.md5 else "no hash known"


INCEPTION = WeightFile(
    what="Inception of 2015-12-05 (FID, sFID, IS, KID, precision/recall)",
    names=("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
    source="release v0.2.0 of toshas/torch-fidelity",
    option="evaluation.weights",
    sha256="6726825d",
)
VGG16 = WeightFile(
    what="VGG16 (LPIPS; precision/recall of torch-fidelity)",
    names=("vgg16-397923af.pth",),
    source="torchvision",
    option="evaluation.weights",
    sha256="397923af",
)
LPIPS_VGG = WeightFile(
    what="heads of LPIPS v0.1 for VGG16",
    names=("vgg.pth", "weights-vgg16-lpips.pth"),
    source="richzhang/PerceptualSimilarity, or release v0.2.0 of toshas/torch-fidelity",
    option="evaluation.weights",
)
I3D_TORCHSCRIPT = WeightFile(
    what="I3D as TorchScript (FVD of StyleGAN-V and LARP)",
    names=("i3d_torchscript.pt",),
    source="universome/fvd-comparison",
    option="evaluation.weights",
)
I3D_KINETICS = WeightFile(
    what="I3D trained on Kinetics-400 (FVD of VideoGPT, TATS, OmniTokenizer)",
    names=("i3d_pretrained_400.pt",),
    source="songweige/TATS",
    option="evaluation.weights",
    git_blob="a867b87ac3a9097d200598b1d48a1b890d8ec744",
)


@dataclass(frozen=True)
class Found:
    """A weight file that is there.

    Attributes:
        path: of the file.
        sha256: of its content.
        verified: its hash is the published one; False where none is known.
    """

    path: Path
    sha256: str
    verified: bool


def search(weights: str | None) -> list[Path]:
    """Folders (or the one file) that weight files are looked for in.

    Args:
        weights: file or folder of the configuration; alone if given. Otherwise the folders of the environment variable
            ``VGEN_WEIGHTS`` and torch's own cache ``TORCH_HOME/hub/checkpoints``.
    """
    if weights is not None:
        return [Path(weights).expanduser()]
    folders = [Path(part).expanduser() for part in os.environ.get(WEIGHTS_VARIABLE, "").split(os.pathsep) if part]
    return [*folders, Path(torch.hub.get_dir()) / "checkpoints"]


def find(file: WeightFile, weights: str | None, *, allow_unverified: bool = False) -> Found:
    """Look for a weight file and check its hash.

    Args:
        file: which one.
        weights: see :func:`search`; a path with a suffix names the file itself.
        allow_unverified: accept another hash than the published one.

    Raises:
        UserError: if it is nowhere (every place tried, its name and hash are named) or another file.
    """
    tried: list[Path] = []
    for place in search(weights):
        tried += [place / name for name in file.names] if place.is_dir() or not place.suffix else [place]
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        raise UserError(_missing(file, tried))
    if path.name in WRONG_FILES:
        raise UserError(f"{path} is {WRONG_FILES[path.name]}; use {file.names[0]} from {file.source}")
    digest = file_sha256(path)
    verified = matches(file, path, digest)
    if verified is False and not allow_unverified:
        raise UserError(
            f"{path} is not {file.what}: its SHA-256 starts with {digest[:8]}, expected {file.hash_text}; copy "
            f"{file.names[0]} from {file.source} again, or set evaluation.allow_unverified=true to get scores that are "
            f"not comparable"
        )
    return Found(path, digest, bool(verified))


def matches(file: WeightFile, path: Path, sha256: str) -> bool | None:
    """Whether a file has the published hash; None where none is known."""
    if file.sha256 is not None:
        return sha256.startswith(file.sha256)
    if file.git_blob is not None:
        return _git_blob(path) == file.git_blob
    if file.md5 is not None:
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == file.md5
    return None


def _git_blob(path: Path) -> str:
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as content:
        while block := content.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _missing(file: WeightFile, tried: Iterable[Path]) -> str:
    return (
        f"weights of {file.what} not found (tried: {', '.join(map(str, tried))}); nothing is downloaded. Put "
        f"{file.names[0]} ({file.hash_text}; from {file.source}) at one of these places, name it with {file.option}= "
        f"or {WEIGHTS_VARIABLE}, or choose another extractor with evaluation.features=<TorchScript file>"
    )
