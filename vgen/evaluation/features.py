"""Feature extractors: the Inception network of the FID literature, or any TorchScript file under its own name."""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vgen.checkpoints.release import file_sha256
from vgen.errors import UserError

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256_PREFIX = "6726825d"
WEIGHTS_VARIABLE = "VGEN_WEIGHTS"


@dataclass(frozen=True)
class Extractor:
    """A frozen network from 8-bit pictures to features.

    Attributes:
        network: maps uint8 [B, 3, H, W] to features [B, dim] or (features, logits [B, classes]).
        name: what its scores are called after.
        layer: which layer the features come from.
        file: weights.
        sha256: of the weights file.
        resize_mode: how pictures are brought to the network's size.
        device: where the network lives.
        dim: feature width d.
        classes: width of the logits, None without.
    """

    network: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    name: str
    layer: str
    file: Path
    sha256: str
    resize_mode: str
    device: torch.device
    dim: int
    classes: int | None

    @property
    def is_inception(self) -> bool:
        """Whether the scores may carry the published names (FID, IS, KID)."""
        return self.name == "inception"

    def score_name(self, score: str) -> str:
        """Name of a score with this extractor: ``fd`` is ``fid`` for Inception and ``fd_<name>`` for any other."""
        published = {"fd": "fid", "rfd": "rfid"}
        return published.get(score, score) if self.is_inception else f"{score}_{self.name}"

    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features float32 [B, dim] and logits float32 [B, classes] or None of uint8 pictures [B, 3, H, W]."""
        with torch.inference_mode(), _full_float32():
            output = self.network(pictures.to(self.device))
        features, logits = _split(output)
        return features.float(), None if logits is None else logits.float()

    def describe(self) -> dict:
        """What a report must say about the extractor."""
        return {
            "name": self.name,
            "layer": self.layer,
            "file": str(self.file),
            "sha256": self.sha256,
            "dtype": "float32",
            "tf32": False,
            "device": self.device.type,
            "dim": self.dim,
        }


def _split(output: object) -> tuple[Tensor, Tensor | None]:
    if isinstance(output, tuple | list):
        return output[0], output[1] if len(output) > 1 else None
    assert isinstance(output, Tensor), type(output)
    return output, None


@contextmanager
def _full_float32() -> Iterator[None]:
    """Switch TF32 off: its ten-bit mantissa moves a Frechet distance visibly."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def load_extractor(features: str, *, name: str | None, weights: str | None, device: torch.device) -> Extractor:
    """Load the extractor a configuration asks for.

    Args:
        features: ``inception`` or the path of a TorchScript file.
        name: name of the scores of a TorchScript file; its file stem when None.
        weights: file or folder with the Inception weights; searched in the usual places when None.
        device: where to run it.

    Raises:
        UserError: if a file is missing, is not what it should be, or the name is not usable.
    """
    if features == "inception":
        if name not in (None, "inception"):
            raise UserError("evaluation.features_name names a TorchScript file; with features=inception leave it out")
        return _load_inception(weights, device)
    return _load_torchscript(Path(features).expanduser(), name, device)


def _inception_path(weights: str | None) -> Path:
    if weights is not None:
        places = [Path(weights).expanduser()]
    else:
        places = [Path(os.environ[WEIGHTS_VARIABLE]).expanduser()] if os.environ.get(WEIGHTS_VARIABLE) else []
        places.append(Path(torch.hub.get_dir()) / "checkpoints")
    tried = [place / INCEPTION_FILE if place.is_dir() or place.suffix != ".pth" else place for place in places]
    for path in tried:
        if path.is_file():
            return path
    raise UserError(
        f"Inception weights not found (tried: {', '.join(map(str, tried))}); nothing is downloaded. Either put "
        f"{INCEPTION_FILE} (SHA-256 starts with {INCEPTION_SHA256_PREFIX}; from the release v0.2.0 of torch-fidelity) "
        f"at one of these places or give evaluation.weights=<file>, or choose another extractor with "
        f"evaluation.features=<TorchScript file>"
    )


def _load_inception(weights: str | None, device: torch.device) -> Extractor:
    path = _inception_path(weights)
    digest = file_sha256(path)
    if not digest.startswith(INCEPTION_SHA256_PREFIX):
        raise UserError(
            f"{path} is not the Inception network of the literature: its SHA-256 starts with {digest[:8]}, expected "
            f"{INCEPTION_SHA256_PREFIX} ({INCEPTION_FILE})"
        )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity itself would unpickle whatever it finds
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    return Extractor(
        network=network.to(device),
        name="inception",
        layer="2048",
        file=path,
        sha256=digest,
        resize_mode="tf1_bilinear",
        device=device,
        dim=2048,
        classes=1008,
    )


def _check_name(name: str, path: Path) -> str:
    words = re.split(r"[^a-z]+", name.lower())
    reserved = {"fid", "rfid", "sfid", "inception"} & set(words)
    if reserved or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        why = (
            f"the word {reserved.pop()} is kept for the Inception network" if reserved else "use letters, digits, _ . -"
        )
        raise UserError(f"evaluation.features_name={name} cannot name the scores of {path}: {why}")
    return name


def _load_torchscript(path: Path, name: str | None, device: torch.device) -> Extractor:
    if not path.is_file():
        raise UserError(
            f"evaluation.features={path} is no file; give inception or the path of a TorchScript extractor "
            f"(uint8 [B, 3, H, W] to features, or features and logits)"
        )
    name = _check_name(name or path.stem, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"evaluation.features={path} is not a readable TorchScript file") from error
    dim, classes = _probe(network, path, device)
    return Extractor(
        network=network,
        name=name,
        layer="output",
        file=path,
        sha256=file_sha256(path),
        resize_mode="inside the extractor",
        device=device,
        dim=dim,
        classes=classes,
    )


def _probe(network: nn.Module, path: Path, device: torch.device) -> tuple[int, int | None]:
    """Widths of features and logits, learnt from one forward pass, so that a wrong file stops before any work."""
    contract = "it must map uint8 [B, 3, H, W] to features [B, d] or (features [B, d], logits [B, classes])"
    try:
        with torch.inference_mode():
            output = network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device))
    except (RuntimeError, torch.jit.Error) as error:
        raise UserError(f"evaluation.features={path} failed on a black 32x32 picture; {contract}") from error
    parts = list(output) if isinstance(output, tuple | list) else [output]
    if not 1 <= len(parts) <= 2 or any(not isinstance(t, Tensor) or t.ndim != 2 or len(t) != 2 for t in parts):
        raise UserError(f"evaluation.features={path} returned something else; {contract}")
    return parts[0].shape[1], parts[1].shape[1] if len(parts) == 2 else None
