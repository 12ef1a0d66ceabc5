"""Feature extractors: the networks of the literature, or any TorchScript file under its own name."""

import importlib
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vgen.checkpoints.release import file_sha256
from vgen.errors import UserError
from vgen.evaluation.statistics import content_hash
from vgen.evaluation.weights import INCEPTION, VGG16, Found, find

BUILT_IN = ("inception", "vgg16")
_registered: dict[str, Callable[[], nn.Module]] = {}


class Features(NamedTuple):
    """Output of an extractor, float32.

    Attributes:
        pool: [B, dim], the features of Frechet and kernel distances, precision and recall.
        logits: [B, classes], None without a classifier.
        spatial: [B, spatial_dim] of sFID, None without.
    """

    pool: Tensor
    logits: Tensor | None
    spatial: Tensor | None


@dataclass(frozen=True)
class Extractor:
    """A frozen network from 8-bit pictures to features.

    Attributes:
        network: maps uint8 [B, 3, H, W] to features [B, dim], optionally in a tuple with logits [B, classes] and
            spatial features [B, spatial_dim].
        name: what its scores are called after.
        layer: which layer the features come from.
        file: weights, None for a network made in memory.
        sha256: of the weights file, or of the state dict of a network made in memory.
        resize_mode: how pictures are brought to the network's size.
        device: where the network lives.
        dim: feature width d.
        classes: width of the logits, None without.
        spatial_dim: width of the spatial features, None without.
    """

    network: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    name: str
    layer: str
    file: Path | None
    sha256: str
    resize_mode: str
    device: torch.device
    dim: int
    classes: int | None
    spatial_dim: int | None = None

    @property
    def is_inception(self) -> bool:
        """Whether the scores may carry the published names (FID, sFID, IS, KID)."""
        return self.name == "inception"

    def score_name(self, score: str) -> str:
        """Name of a score with this extractor: ``fd`` is ``fid`` for Inception and ``fd_<name>`` for any other."""
        published = {"fd": "fid", "rfd": "rfid", "sfd": "sfid", "rsfd": "rsfid"}
        return published.get(score, score) if self.is_inception else f"{score}_{self.name}"

    def extract(self, pictures: Tensor) -> Features:
        """Everything the network returns of uint8 pictures [B, 3, H, W].

        Raises:
            UserError: for pictures that are not 8-bit: a float in [0, 1] and one in [-1, 1] look alike to a network.
        """
        if pictures.dtype != torch.uint8:
            raise UserError(
                f"pictures to score must be uint8 0..255, not {pictures.dtype} (vgen.pixels.to_uint8 rounds)"
            )
        with torch.inference_mode(), full_float32():
            output = self.network(pictures.to(self.device, non_blocking=True))
        parts = list(output) if isinstance(output, tuple | list) else [output]
        logits, spatial = (*(part.float() for part in parts[1:]), None, None)[:2]
        return Features(parts[0].float(), logits, spatial)

    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features float32 [B, dim] and logits float32 [B, classes] or None of uint8 pictures [B, 3, H, W]."""
        return self.extract(pictures)[:2]

    def conventions(self) -> dict:
        """What two sets must share for a distance between them to mean anything: the meta data of statistics."""
        return {
            "extractor": self.name,
            "layer": self.layer,
            "extractor_sha256": self.sha256,
            "resize_mode": self.resize_mode,
        }

    def describe(self) -> dict:
        """What a report must say about the extractor."""
        return {
            "name": self.name,
            "layer": self.layer,
            "file": None if self.file is None else str(self.file),
            "sha256": self.sha256,
            "dtype": "float32",
            "tf32": False,
            "device": self.device.type,
            "dim": self.dim,
        }


@contextmanager
def full_float32() -> Iterator[None]:
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
        features: ``inception``, ``vgg16``, a registered name, the path of a TorchScript file, or
            ``package.module:function`` for a function that makes the network (see :func:`network_extractor`).
        name: name of the scores of such a file or function; its own name when None.
        weights: file or folder with the published weights; searched in the usual places when None.
        device: where to run it.

    Raises:
        UserError: if a file is missing, is not what it should be, or the name is not usable.
    """
    if features in BUILT_IN or features in _registered:
        if name not in (None, features):
            raise UserError(f"evaluation.features_name names a TorchScript file; with features={features} leave it out")
        if features == "inception":
            return inception_extractor(find(INCEPTION, weights).path, device=device)
        if features == "vgg16":
            return vgg16_extractor(find(VGG16, weights).path, device=device)
        return network_extractor(_registered[features](), name=features, device=device)
    if ":" in features and not Path(features).expanduser().exists():
        return _imported(features, name, device)
    return _load_torchscript(Path(features).expanduser(), name, device)


def _imported(features: str, name: str | None, device: torch.device) -> Extractor:
    """The network that a function of the user's own code makes, given as ``package.module:function``."""
    module, _, function = features.partition(":")
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"evaluation.features={features} cannot be imported ({error})") from error
    return network_extractor(build(), name=name or function, device=device, what=f"evaluation.features={features}")


def read_state(path: Path) -> dict[str, Tensor]:
    """State dict of a weight file, read without unpickling anything but tensors.

    Raises:
        UserError: if the file is damaged or holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is truncated or not a file of weights; copy it again") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no flat state dict")
    return dict(content)


def published_name(name: str, found: Found) -> str:
    """Name of the scores of a published network; other weights than the published ones get a name that says so."""
    return name if found.verified else f"{name}-unverified-{found.sha256[:8]}"


def inception_extractor(
    path: Path, *, device: torch.device, resize_mode: str = "tf1_bilinear", allow_unverified: bool = False
) -> Extractor:
    """The Inception network of FID from its weight file.

    Both dialects, torch-fidelity's and the ADM suite's, use this network with ``tf1_bilinear``; they differ in the
    estimators. With another resize or unverified weights the scores carry another name than the published ones.

    Args:
        path: ``weights-inception-2015-12-05-6726825d.pth`` or ``pt_inception-2015-12-05-6726825d.pth``.
        device: where to run it.
        resize_mode: one of :data:`vgen.evaluation.resize.RESIZE_MODES`.
        allow_unverified: accept a file of another hash, under the name ``inception-unverified-<hash>``.

    Raises:
        UserError: if the file is damaged, has another hash, or does not fit the network.
    """
    from vgen.evaluation.inception import CLASSES, POOL_DIM, SPATIAL_DIM, Inception

    found = find(INCEPTION, str(path), allow_unverified=allow_unverified)
    name = published_name("inception", found)
    network = Inception(read_state(path), resize_mode=resize_mode)
    return Extractor(
        network=network.to(device),
        name=name if resize_mode == "tf1_bilinear" else f"{name}-{resize_mode}",
        layer="2048",
        file=path,
        sha256=found.sha256,
        resize_mode=resize_mode,
        device=device,
        dim=POOL_DIM,
        classes=CLASSES,
        spatial_dim=SPATIAL_DIM,
    )


def vgg16_extractor(path: Path, *, device: torch.device, allow_unverified: bool = False) -> Extractor:
    """VGG16's second fully connected layer after ReLU, torch-fidelity's default for precision and recall.

    Args:
        path: torchvision's ``vgg16-397923af.pth``.
        device: where to run it.
        allow_unverified: accept a file of another hash, under the name ``vgg16-unverified-<hash>``.

    Raises:
        UserError: if the file is damaged, has another hash, or does not fit the network.
    """
    from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

    found = find(VGG16, str(path), allow_unverified=allow_unverified)
    buffer = io.BytesIO()  # read by us first: torch-fidelity would unpickle whatever the file holds
    torch.save(read_state(path), buffer)
    buffer.seek(0)
    try:
        network = FeatureExtractorVGG16("vgg16", ["fc2_relu"], feature_extractor_weights_path=buffer)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit VGG16 ({' '.join(str(error).split())[:200]})") from error
    return Extractor(
        network=network.to(device),
        name=published_name("vgg16", found),
        layer="fc2_relu",
        file=path,
        sha256=found.sha256,
        resize_mode="tf1_bilinear",
        device=device,
        dim=4096,
        classes=None,
    )


def check_name(name: str, what: str | Path) -> str:
    """Return the name of a stand-in.

    Raises:
        UserError: if it is not a plain word, or could be taken for a published score.
    """
    words = {*re.split(r"[^a-z]+", name.lower()), *re.split(r"[^a-z0-9]+", name.lower())}
    reserved = words & {"fid", "rfid", "sfid", "fvd", "rfvd", "i3d", "inception"}
    if reserved or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        why = (
            f"the word {reserved.pop()} is kept for the networks of the literature"
            if reserved
            else "use letters, digits, _ . -"
        )
        raise UserError(f"evaluation.features_name={name} cannot name the scores of {what}: {why}")
    return name


def _load_torchscript(path: Path, name: str | None, device: torch.device) -> Extractor:
    if not path.is_file():
        raise UserError(
            f"evaluation.features={path} is no file; give {', '.join(BUILT_IN + tuple(_registered))} or the path of a "
            f"TorchScript extractor (uint8 [B, 3, H, W] to features, or features and logits)"
        )
    name = check_name(name or path.stem, path)
    network = load_script(path, device)
    return replace(
        network_extractor(network, name=name, device=device, what=f"evaluation.features={path}"),
        file=path,
        sha256=file_sha256(path),
    )


def load_script(path: Path, device: torch.device) -> nn.Module:
    """Read a TorchScript file.

    Raises:
        UserError: if the file is not one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path} is not a readable TorchScript file") from error


def network_extractor(network: nn.Module, *, name: str, device: torch.device, what: str | None = None) -> Extractor:
    """Make an extractor of a network in memory.

    Args:
        network: maps uint8 [B, 3, H, W] to features [B, d], or to a tuple (features, logits [B, classes]) or
            (features, logits, spatial features [B, s]).
        name: what its scores are called after.
        device: where to run it.
        what: what messages call it.

    Raises:
        UserError: if the name is kept for published scores or the network does not do that on a black picture.
    """
    what = what or f"extractor {name}"
    check_name(name, what)
    network = network.to(device).eval()
    widths = [*_probe(network, what, device), None, None]
    state = network.state_dict()
    return Extractor(
        network=network,
        name=name,
        layer="output",
        file=None,
        sha256=content_hash(part for key, value in sorted(state.items()) for part in (key, value)),
        resize_mode="inside the extractor",
        device=device,
        dim=widths[0] or 0,
        classes=widths[1],
        spatial_dim=widths[2],
    )


def register_extractor(name: str, build: Callable[[], nn.Module]) -> None:
    """Make a network available as ``evaluation.features=<name>``; its scores carry that name.

    Args:
        name: a name that is not taken.
        build: makes the network, see :func:`network_extractor` for what it must do.

    Raises:
        UserError: if the name is taken or kept for published scores.
    """
    check_name(name, f"extractor {name}")
    if name in BUILT_IN or name in _registered:
        raise UserError(f"an extractor named {name} is registered already; choose another name")
    _registered[name] = build


def _probe(network: nn.Module, what: str, device: torch.device) -> list[int | None]:
    """Widths of the outputs, learnt from one forward pass, so that a wrong network stops before any work."""
    contract = "it must map uint8 [B, 3, H, W] to features [B, d] or (features [B, d], logits [B, classes])"
    try:
        with torch.inference_mode():
            output = network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device))
    except (RuntimeError, torch.jit.Error) as error:
        raise UserError(f"{what} failed on a black 32x32 picture; {contract}") from error
    parts = list(output) if isinstance(output, tuple | list) else [output]
    if not 1 <= len(parts) <= 3 or any(not isinstance(t, Tensor) or t.ndim != 2 or len(t) != 2 for t in parts):
        raise UserError(f"{what} returned something else; {contract}")
    return [part.shape[1] for part in parts]
