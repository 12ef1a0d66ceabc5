"""The feature networks a job needs, found and checked before any work."""

import sys
from pathlib import Path

import torch

from vgen.errors import UserError
from vgen.evaluation.clip_features import ClipExtractor, load_clip_script, load_fvd_extractor
from vgen.evaluation.collect import AnyExtractor
from vgen.evaluation.features import Extractor, inception_extractor, load_extractor, vgg16_extractor
from vgen.evaluation.fvd import fvd_variant
from vgen.evaluation.settings import CLIP_METRICS, DISTANCES, EvaluationSettings
from vgen.evaluation.weights import I3D_KINETICS, I3D_TORCHSCRIPT, INCEPTION, VGG16, Found, WeightFile, find
from vgen.losses.perceptual import LPIPS, load_lpips
from vgen.runtime import rank


def _announced(file: WeightFile, weights: str | None, *, allow_unverified: bool) -> Found:
    """Find a weight file and say which one is used."""
    found = find(file, weights, allow_unverified=allow_unverified)
    if rank() == 0:
        state = "checked" if found.verified else "NOT the published file" if file.hashed else "no hash known"
        print(f"{file.what}: {found.path} (SHA-256 {found.sha256[:8]}, {state})", file=sys.stderr, flush=True)
    return found


def load_for_pictures(
    features: str,
    *,
    name: str | None,
    weights: str | None,
    device: torch.device,
    resize_mode: str = "tf1_bilinear",
    allow_unverified: bool = False,
) -> Extractor:
    """An extractor of pictures, with published weights looked for in the usual places.

    Args:
        features: ``inception``, ``vgg16``, a registered name or the path of a TorchScript file.
        name: name of a TorchScript file's scores; its file stem when None.
        weights: file or folder of published weights; None for the usual places.
        device: where to run it.
        resize_mode: of Inception.
        allow_unverified: accept weights of another hash under another name.

    Raises:
        UserError: if weights are missing or another file than the published one, or the extractor cannot be used.
    """
    if features not in ("inception", "vgg16"):
        return load_extractor(features, name=name, weights=None, device=device)
    if name not in (None, features):
        raise UserError(f"evaluation.features_name names a TorchScript file; with features={features} leave it out")
    file = INCEPTION if features == "inception" else VGG16
    path = _announced(file, weights, allow_unverified=allow_unverified).path
    if features == "vgg16":
        return vgg16_extractor(path, device=device, allow_unverified=allow_unverified)
    return inception_extractor(path, device=device, resize_mode=resize_mode, allow_unverified=allow_unverified)


def picture_extractor(settings: EvaluationSettings, device: torch.device) -> Extractor | None:
    """The extractor of the picture metrics, None if none of them is asked for; see :func:`load_for_pictures`."""
    if settings.picture_features is None:
        return None
    return load_for_pictures(
        settings.picture_features,
        name=settings.features_name,
        weights=settings.weights,
        device=device,
        resize_mode=settings.resize_mode,
        allow_unverified=settings.allow_unverified,
    )


def clip_extractor(settings: EvaluationSettings, device: torch.device) -> ClipExtractor | None:
    """The extractor of the clip metrics, None if none of them is asked for.

    Raises:
        UserError: if weights are missing or another file than the published one.
    """
    if not set(settings.metrics) & set(CLIP_METRICS):
        return None
    variant = fvd_variant(settings.fvd_variant)
    if settings.features is not None:
        path = Path(settings.features).expanduser()
        if not path.is_file():
            raise UserError(
                f"evaluation.features={path} is no file; for clips give a TorchScript stand-in for I3D, or leave it out"
            )
        return load_clip_script(path, variant, name=settings.features_name, device=device)
    file = I3D_TORCHSCRIPT if variant.detector == "torchscript" else I3D_KINETICS
    path = _announced(file, settings.weights, allow_unverified=settings.allow_unverified).path
    return load_fvd_extractor(variant, path, device=device, allow_unverified=settings.allow_unverified)


def perceptual_network(settings: EvaluationSettings, device: torch.device) -> LPIPS | None:
    """LPIPS with VGG16, None if it is not asked for.

    Raises:
        UserError: if weights are missing or damaged.
    """
    if "lpips" not in settings.metrics:
        return None
    try:
        return load_lpips(settings.weights).to(device)
    except UserError as error:
        text = (
            str(error).replace("perceptual=lpips", "metric lpips").replace("perceptual_weights", "evaluation.weights")
        )
        text = text.replace("train without it: perceptual=none", "leave lpips out of the metrics")
        raise UserError(text) from error


def reconstruction_networks(
    settings: EvaluationSettings, device: torch.device, *, clips: bool
) -> tuple[AnyExtractor | None, LPIPS | None]:
    """Feature network and perceptual network of a reconstruction job, None where none is asked for.

    Raises:
        UserError: naming all that is missing at once.
    """
    extractor, lpips, problems = None, None, []
    try:
        if set(settings.metrics) & set(DISTANCES):
            extractor = clip_extractor(settings, device) if clips else picture_extractor(settings, device)
    except UserError as error:
        problems.append(str(error))
    try:
        lpips = perceptual_network(settings, device)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("; and ".join(problems))
    return extractor, lpips


def published(extractor: AnyExtractor | None) -> bool:
    """Whether an extractor's scores may carry the names of the literature."""
    if isinstance(extractor, ClipExtractor):
        return extractor.is_published
    return extractor is not None and extractor.is_inception
