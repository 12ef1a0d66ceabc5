"""Release folders, our format to share: ``config.yaml`` + ``model.safetensors`` (+ ``tokenizer/`` for a generator).

A release holds plain data only. Building its networks runs nothing but vgen's own constructors, so a release from a
stranger is as safe to load as its safetensors file.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import get_object, instantiate
from safetensors.torch import save_file
from torch import Tensor, nn

from vgen import __version__
from vgen.checkpoints.convert import load_strict, read_weights
from vgen.checkpoints.text_features import read_captions, read_text_features
from vgen.errors import UserError
from vgen.generators.conditioning import TextContext
from vgen.generators.joint_text import JointText
from vgen.generators.transformer import Transformer
from vgen.runtime import git_commit
from vgen.sampling.engine import Engine
from vgen.sampling.extrapolate import ExtrapolatingPipeline, Extrapolation
from vgen.sampling.first_frames import FromData
from vgen.sampling.given import Edit
from vgen.sampling.long_clips import LongPipeline, overlapping_tokens
from vgen.sampling.pipeline import Pipeline
from vgen.sampling.pixels import PixelSettings
from vgen.schedules.catalog import decodable
from vgen.schedules.plan import Plan
from vgen.tokenizers.autoencoder_kl import AutoencoderKL
from vgen.tokenizers.base import Tokenizer
from vgen.tokenizers.causal3d import Causal3D

FORMAT = "vgen.release/1"
CONFIG, WEIGHTS, TOKENIZER = "config.yaml", "model.safetensors", "tokenizer"


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file as hex digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def save_release(
    folder: str | Path,
    module: nn.Module,
    config: dict[str, Any],
    *,
    kind: str,
    extra: dict[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    state: dict[str, Tensor] | None = None,
) -> Path:
    """Write a release folder; an existing one is replaced only after the new one is complete.

    Args:
        folder: where to write.
        module: the network, for its state dict.
        config: resolved constructor arguments of the network with ``_target_``, plain containers.
        kind: ``tokenizer``, ``vae`` or ``generator``.
        extra: further top-level entries: ``schedule`` (required for a generator), ``data``, ``training``.
        tokenizer: release folder of the tokenizer, copied into a generator's release.
        state: weights to write instead of the module's own.

    Returns:
        The folder.

    Raises:
        UserError: if the folder cannot be written.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    weights = module.state_dict() if state is None else state
    document = {
        "format": FORMAT,
        "kind": kind,
        "vgen": {"version": __version__, "commit": git_commit()},
        "network": config,
        **(extra or {}),
    }
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, partial / WEIGHTS)
        (partial / CONFIG).write_text(yaml.safe_dump(document, sort_keys=False))
        if tokenizer is not None:
            shutil.copytree(tokenizer, partial / TOKENIZER)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise UserError(
            f"the release {folder} cannot be written ({error.strerror}); free space or choose another folder"
        ) from error
    return folder


def read_config(folder: str | Path, kind: str) -> dict[str, Any]:
    """Read and check the configuration of a release.

    Raises:
        UserError: if the folder is not a release of that kind.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not a release folder: {path} is missing (training writes one to <run>/release)")
    try:
        document = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path} is not a {FORMAT} configuration")
    if document.get("kind") != kind:
        raise UserError(f"{folder} is the release of a {document.get('kind')}, a {kind} is needed here")
    return document


def build(config: Any, **arguments: Any) -> Any:
    """Instantiate a configuration whose every ``_target_`` is defined in vgen.

    Args:
        config: plain containers with ``_target_``.
        arguments: further keyword arguments of the outermost target.

    Raises:
        UserError: if a target lies outside vgen or the arguments do not fit its constructor.
    """
    _check_targets(config)
    try:
        return instantiate(config, **arguments)
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(f"{config.get('_target_')} cannot be built from its configuration: {cause or error}") from error


def _check_targets(node: Any) -> None:
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None:
            defined = getattr(get_object(target), "__module__", "") if str(target).startswith("vgen.") else ""
            if not str(defined).startswith("vgen."):
                raise UserError(f"_target_: {target} is not one of vgen's own classes or functions; refusing to run it")
        for value in node.values():
            _check_targets(value)
    elif isinstance(node, list):
        for value in node:
            _check_targets(value)


def _load(folder: str | Path, kind: str) -> tuple[nn.Module, dict[str, Any]]:
    document = read_config(folder, kind)
    module = build(document["network"])
    load_strict(module, read_weights(Path(folder) / WEIGHTS), what=str(Path(folder) / WEIGHTS))
    return module.eval().requires_grad_(False), document


def load_tokenizer(folder: str | Path, *, scale: int = 1) -> Tokenizer:
    """Load a frozen tokenizer on the CPU from its release, or from the ``tokenizer/`` of a generator's release.

    Args:
        folder: release.
        scale: how many times larger the pictures are than those the tokenizer was configured for.

    Raises:
        UserError: if the folder is no tokenizer release, the weights do not fit, or the tokenizer has one size only.
    """
    inner = Path(folder) / TOKENIZER
    where = inner if inner.is_dir() else folder
    module, document = _load(where, "tokenizer")
    if scale != 1:
        config = document["network"]
        larger = build(config | {"image_size": config["image_size"] * scale})
        load_strict(larger, module.state_dict(), what=f"{where} at {scale} times its picture size")
        module = larger.eval().requires_grad_(False)
    assert isinstance(module, Tokenizer)
    return module


def load_vae(folder: str | Path) -> tuple[AutoencoderKL, dict[str, Any]]:
    """Load a frozen VAE on the CPU.

    Returns:
        The network and its constructor arguments with ``_target_``.

    Raises:
        UserError: if the folder is no VAE release or the weights do not fit.
    """
    module, document = _load(folder, "vae")
    assert isinstance(module, AutoencoderKL)
    return module, document["network"]


def load_generator(folder: str | Path) -> tuple[Transformer, dict[str, Any]]:
    """Load a frozen generator on the CPU.

    Returns:
        The network and the release's configuration.

    Raises:
        UserError: if the folder is no generator release or the weights do not fit.
    """
    module, document = _load(folder, "generator")
    assert isinstance(module, Transformer)
    return module, document


def make_plan_for(generator: Transformer, schedule: dict[str, Any]) -> Plan:
    """Build the plan of a schedule configuration for the grid and condition of a generator."""
    return build(schedule)(grid=generator.grid, num_condition=generator.num_condition)


def load_pipeline(
    folder: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    schedule: dict[str, Any] | None = None,
    picture_size: int | None = None,
    edit: Edit | None = None,
    extrapolation: Extrapolation | None = None,
    num_tokens: int | None = None,
    text_features: str | Path | None = None,
    predict: dict[str, Any] | None = None,
    num_frames: int | None = None,
    overlap: int | None = None,
    engine: Engine = "auto",
    pixels: PixelSettings | None = None,
) -> Pipeline:
    """Load everything needed to sample from a generator's release.

    Args:
        folder: release of a generator, with its tokenizer inside.
        device: where to run.
        dtype: of the generator; the tokenizer's weights stay in float32.
        cache_dtype: of the keys and values that decoding keeps; null = that of the generator.
        schedule: schedule configuration to decode with; null = the one the generator was trained with.
        picture_size: side in pixels of the pictures; null = as the tokenizer decodes them.
        edit: picture of which a part is kept; null = none.
        extrapolation: decode pictures larger than trained; null = not.
        num_tokens: decide only the first tokens of every sample; null = all. See :mod:`vgen.sampling.prefix`.
        text_features: features of the captions that labels count, for a generator on text. See
            :func:`vgen.checkpoints.text_features.read_text_features` and ``read_captions``.
        predict: configuration of :class:`vgen.sampling.first_frames.Start`, for a generator that predicts frames;
            ``data: null`` in it means the data the generator was trained on.
        num_frames: frames of clips longer than trained; null = as trained.
        overlap: see :class:`vgen.sampling.long_clips.LongPipeline`.
        engine: how the passes run, see :class:`vgen.sampling.engine.Decoder`.
        pixels: how the tokenizer decodes.

    Raises:
        UserError: for a damaged release, parts that do not fit, or a schedule the generator was not trained for.
    """
    generator, document = load_generator(folder)
    config = document["schedule"] if schedule is None else schedule
    plan, trained = make_plan_for(generator, config), make_plan_for(generator, document["schedule"])
    if not plan.same_training(trained):
        raise UserError(
            f"schedule '{plan.name}' does not fit {folder}, which was trained with '{trained.name}'; choose one of "
            f"{', '.join(decodable(trained))}"
        )
    if isinstance(generator.condition, TextContext) and text_features is not None:
        generator.condition.attach(read_text_features(text_features))
    elif isinstance(generator.condition, JointText) and text_features is not None:
        generator.condition.attach(read_captions(text_features))
    elif text_features is not None:
        raise UserError("text_features has no effect: this generator is not conditioned on text")
    tokenizer = load_tokenizer(folder).to(device)
    if cache_dtype is not None and not plan.needs_cache:
        raise UserError(f"cache_dtype has no effect: schedule '{plan.name}' keeps no keys and values")
    generator = generator.to(device, dtype)
    generator.cache_dtype = cache_dtype
    if overlap is not None and num_frames is None:
        raise UserError("overlap joins the windows of long clips; give num_frames, too")
    if extrapolation is not None:
        if num_tokens is not None:
            raise UserError("extrapolate needs all tokens of the trained size; leave num_tokens out")
        if num_frames is not None or predict is not None:
            raise UserError("extrapolate makes larger pictures; it cannot be combined with num_frames or predict")
        if edit is not None:
            raise UserError("edit and extrapolate cannot be combined; take one after the other")
        fine = {"num_known": plan.num_tokens, "steps": extrapolation.steps} if plan.has_queries else {}
        finer_grid = tuple(side * extrapolation.factor for side in plan.grid)
        return ExtrapolatingPipeline(
            generator=generator,
            tokenizer=load_tokenizer(folder, scale=extrapolation.factor).to(device),
            plan=plan,
            fine_plan=build(config | fine)(grid=finer_grid, num_condition=generator.num_condition),
            extrapolation=extrapolation,
            picture_size=picture_size,
            engine=engine,
            pixels=pixels,
        )
    given = None if edit is None else edit.given(tokenizer)
    if given is not None and plan.has_queries:
        # Such an order takes what is given first, so that everything else is decided in view of it.
        plan = make_plan_for(generator, config | {"num_known": given.count})
    training = document.get("training") or {}
    parts: dict[str, Any] = {
        "generator": generator,
        "tokenizer": tokenizer,
        "plan": plan,
        "picture_size": picture_size,
        "given": given,
        "num_tokens": num_tokens,
        "start": None if predict is None else build(_start_config(predict, training)),
        "given_frames": document.get("given_frames"),
        "engine": engine,
        "pixels": pixels,
        "unconditional": training.get("task", {}).get("condition_dropout") == 1,
    }
    if num_frames is None:
        return Pipeline(**parts)
    if num_tokens is not None:
        raise UserError("num_tokens decides the first tokens of a picture; it cannot be combined with num_frames")
    pipeline = LongPipeline(num_frames=num_frames, overlap=overlap, **parts)
    if plan.has_queries and isinstance(tokenizer, Causal3D):
        tokens = overlapping_tokens(tokenizer, pipeline.overlap)
        pipeline.next_plan = make_plan_for(generator, config | {"num_known": tokens})
    return pipeline


def _start_config(predict: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """A configuration of first frames whose data are named."""
    if get_object(predict["_target_"]) is not FromData or predict.get("data") is not None:
        return predict
    if "data" not in training:
        raise UserError("this release does not say what it was trained on; choose data with data@predict.data=<name>")
    return predict | {"data": training["data"]}
