"""Feature extractors of clips: the I3D files of the FVD literature, or any network under its own name."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vgen.checkpoints.release import file_sha256
from vgen.errors import UserError
from vgen.evaluation.features import check_name, full_float32, load_script, published_name, read_state
from vgen.evaluation.fvd import FVDVariant, prepare_clips
from vgen.evaluation.i3d import CLASSES, MIN_FRAMES, SIDE, load_i3d
from vgen.evaluation.weights import I3D_KINETICS, I3D_TORCHSCRIPT, find

DETECTORS = {"kinetics400": I3D_KINETICS, "torchscript": I3D_TORCHSCRIPT}


@dataclass(frozen=True)
class ClipExtractor:
    """A frozen network from clips to features, with the preparation of one FVD variant.

    Attributes:
        network: maps prepared clips (see :func:`vgen.evaluation.fvd.prepare_clips`) to features [B, dim].
        variant: the variant.
        name: ``i3d`` for the detector of the literature, else what its scores are called after.
        file: weights, None for a network made in memory.
        sha256: of the weights file, empty for a network made in memory.
        verified: whether the weights are known to be the published ones.
        device: where the network lives.
        dim: feature width.
    """

    network: Callable[[Tensor], Tensor]
    variant: FVDVariant
    name: str
    file: Path | None
    sha256: str
    verified: bool
    device: torch.device
    dim: int

    @property
    def is_published(self) -> bool:
        """Whether the scores may be called FVD."""
        return self.name == "i3d"

    def score_name(self, score: str) -> str:
        """``fvd``, ``rfvd`` and ``kvd`` get the variant's name; of a stand-in they become ``video_fd_<name>``, ..."""
        if self.is_published:
            return f"{score}_{self.variant.name}"
        return f"{ {'fvd': 'video_fd', 'rfvd': 'video_rfd', 'kvd': 'video_kd'}.get(score, score) }_{self.name}"

    def __call__(self, clips: Tensor) -> Tensor:
        """Features float32 [B, dim] of clips uint8, or float in [0, 1], [B, 3, T, H, W]."""
        with torch.inference_mode(), full_float32():
            return self.network(prepare_clips(clips.to(self.device, non_blocking=True), self.variant)).float()

    def check_frames(self, frames: int) -> None:
        """Refuse clips that are too short for the detector, before any work.

        Raises:
            UserError: for fewer than 9 frames.
        """
        if self.is_published and frames < MIN_FRAMES:
            raise UserError(f"FVD needs clips of at least {MIN_FRAMES} frames, these have {frames}")

    def conventions(self) -> dict:
        """What two sets must share for a distance between them to mean anything: the meta data of statistics."""
        return {
            "extractor": self.name,
            "extractor_sha256": self.sha256,
            "fvd_variant": self.variant.name,
            "ddof": self.variant.ddof,
        }

    def describe(self) -> dict:
        """What a report must say about the extractor."""
        return {
            "name": self.name,
            "layer": "logits" if self.is_published else "output",
            "file": None if self.file is None else str(self.file),
            "sha256": self.sha256,
            "verified": self.verified,
            "dtype": "float32",
            "tf32": False,
            "device": self.device.type,
            "dim": self.dim,
        }


class _Script(nn.Module):
    """The TorchScript detector of StyleGAN-V with the arguments of a variant."""

    def __init__(self, script: nn.Module, *, rescale: bool, resize: bool):
        super().__init__()
        self.script, self.rescale, self.resize = script, rescale, resize

    def forward(self, clips: Tensor) -> Tensor:
        return self.script(clips, rescale=self.rescale, resize=self.resize, return_features=True)


def load_fvd_extractor(
    variant: FVDVariant, path: Path, *, device: torch.device, allow_unverified: bool = False
) -> ClipExtractor:
    """The detector of a variant from its file.

    Args:
        variant: see :data:`vgen.evaluation.fvd.FVD_VARIANTS`.
        path: ``i3d_pretrained_400.pt`` or ``i3d_torchscript.pt``, whichever the variant's ``detector`` needs.
        device: where to run it.
        allow_unverified: accept Kinetics weights of another hash, under the name ``i3d-unverified-<hash>``. No hash of
            the TorchScript file is known: its scores are called FVD, and the report tells its SHA-256.

    Raises:
        UserError: if the file is damaged, not the expected one, or does not do what a detector must do.
    """
    found = find(DETECTORS[variant.detector], str(path), allow_unverified=allow_unverified)
    if variant.detector == "torchscript":
        network: nn.Module = _Script(
            load_script(path, device), rescale=variant.rescale, resize=variant.fit == "detector"
        )
        name, dim = "i3d", _probe(network, str(path), variant, device)
    else:
        network = load_i3d(read_state(path)).to(device)
        name, dim = published_name("i3d", found), CLASSES
    return ClipExtractor(network, variant, name, path, found.sha256, found.verified, device, dim)


def clip_extractor(
    network: nn.Module, variant: FVDVariant, *, name: str, device: torch.device, file: Path | None = None
) -> ClipExtractor:
    """A stand-in for I3D, with the preparation of a variant; its scores carry its name.

    Args:
        network: maps float [B, 3, T, 224, 224] in [-1, 1] to features [B, d].
        variant: see :data:`vgen.evaluation.fvd.FVD_VARIANTS`; a resize left to its detector is done before.
        name: what the scores are called after.
        device: where to run it.
        file: the file it came from.

    Raises:
        UserError: if the name is kept for published scores, or the network does something else.
    """
    if variant.fit == "detector":
        variant = replace(variant, fit="stretch", rescale=False)
    what = f"clip extractor {name}"
    check_name(name, what)
    network = network.to(device).eval()
    dim = _probe(network, what, variant, device)
    sha256 = "" if file is None else file_sha256(file)
    return ClipExtractor(network, variant, name, file, sha256, False, device, dim)


def load_clip_script(path: Path, variant: FVDVariant, *, name: str | None, device: torch.device) -> ClipExtractor:
    """A TorchScript stand-in for I3D; named after its file when ``name`` is None. See :func:`clip_extractor`."""
    return clip_extractor(load_script(path, device), variant, name=name or path.stem, device=device, file=path)


def _probe(network: nn.Module, what: str, variant: FVDVariant, device: torch.device) -> int:
    """Width of the features, learnt from one black clip, so that a wrong file stops before any work."""
    contract = "it must map clips [B, 3, T, 224, 224] to features [B, d]"
    black = torch.zeros(1, 3, 16, SIDE, SIDE, dtype=torch.uint8, device=device)
    try:
        with torch.inference_mode():
            output = network(prepare_clips(black, variant))
    except (RuntimeError, torch.jit.Error, TypeError) as error:
        raise UserError(f"{what} failed on a black clip of 16 frames; {contract}") from error
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 1:
        raise UserError(f"{what} returned something else; {contract}")
    return output.shape[1]
