"""Completing a two-stage TiTok from its teacher or its first stage, and starting from released weights."""

from pathlib import Path

from torch import Tensor

from vgen.checkpoints.convert import load_strict, read_weights
from vgen.checkpoints.release import WEIGHTS, load_tokenizer, read_config
from vgen.checkpoints.text_features import read_text_features
from vgen.errors import UserError
from vgen.tokenizers.base import Autoencoder
from vgen.tokenizers.proxy import ProxyTokenizer
from vgen.training.settings import Node

_FROM_TEACHER = ("proxy_codebook_size", "pixel_decoder")
# Options that change what weights mean without changing their shapes.
_UNSEEN = ("_target_", "l2_normalize", "latent_layout", "encoder", "decoder")


def load_teacher(folder: str) -> ProxyTokenizer:
    """The frozen tokenizer whose codes are predicted.

    Raises:
        UserError: if there is no such release or its kind of tokenizer has no codes on a grid.
    """
    if not Path(folder).is_dir():
        raise UserError(
            f"task.teacher={folder} does not exist; give the release of a VQGAN trained with task=tokenizer, or import "
            "the published MaskGIT-VQGAN: python -m vgen.checkpoints.titok <file> --preset maskgit_vqgan --out <folder>"
        )
    read_config(folder, "tokenizer")
    teacher = load_tokenizer(folder)
    if not isinstance(teacher, ProxyTokenizer):
        raise UserError(
            f"task.teacher={folder} is a {type(teacher).__name__}; it must be a VQGAN or MaskGIT-VQGAN, whose codes "
            "lie on a grid of patches"
        )
    return teacher


def complete_with_teacher(network: Node, teacher: ProxyTokenizer) -> Node:
    """Fill in what a two-stage TiTok takes from its teacher.

    Raises:
        UserError: if the configuration states another value, or the two do not fit each other.
    """
    if network.get("head") != "proxy":
        raise UserError("task=titok_stage1 trains a TiTok with tokenizer.head=proxy; for head=pixel use task=tokenizer")
    if network["image_size"] != teacher.image_size:
        raise UserError(
            f"tokenizer.image_size={network['image_size']} differs from the teacher's {teacher.image_size}; make them "
            "equal"
        )
    side = network["image_size"] // (network.get("decoder_patch_size") or network["patch_size"])
    if tuple(teacher.grid) != (side, side):
        raise UserError(
            f"the teacher gives {teacher.grid[0]} x {teacher.grid[1]} codes but tokenizer.patch_size="
            f"{network['patch_size']} makes {side} x {side} patches; set "
            f"tokenizer.patch_size={teacher.image_size // teacher.grid[0]}"
        )
    return _filled(
        network,
        {"proxy_codebook_size": teacher.codebook_size, "pixel_decoder": teacher.pixel_decoder_config()},
        "the teacher's",
    )


def complete_from_release(network: Node, folder: str) -> Node:
    """Fill in what a two-stage TiTok took from its teacher in the release it starts from.

    Raises:
        UserError: if there is no such release, or the configuration states another value there or in an option that the
            weights do not show.
    """
    if not Path(folder).is_dir():
        raise UserError(f"task.init_from={folder} does not exist; give the release folder of a tokenizer")
    stored = read_config(folder, "tokenizer")["network"]
    for key in _UNSEEN:
        if key in stored and network.get(key) != stored[key]:
            raise UserError(
                f"tokenizer.{key}={network.get(key)} differs from {stored[key]}, with which task.init_from={folder} "
                "was trained; make it equal"
            )
    if network.get("head") != "proxy":
        return network
    return _filled(network, {key: stored.get(key) for key in _FROM_TEACHER}, "that of task.init_from")


def load_start(tokenizer: Autoencoder, folder: str) -> None:
    """Load released weights into a freshly built tokenizer.

    Raises:
        UserError: if they do not fit.
    """
    load_strict(tokenizer, read_weights(Path(folder) / WEIGHTS), what=f"task.init_from={folder}")


def load_text_features(path: str | None, tokenizer: Autoencoder, num_classes: int) -> Tensor | None:
    """Text features of every class for a text-aware tokenizer.

    Args:
        path: safetensors file with ``features`` [classes, T, E], such as CLIP's for "A photo of a {class}.", or None.
        tokenizer: the network.
        num_classes: classes of the data.

    Raises:
        UserError: if the tokenizer needs features and none are given, or the other way round, or they do not fit.
    """
    length, dim = getattr(tokenizer, "text_length", 0), getattr(tokenizer, "text_dim", 0)
    if path is None:
        if length:
            raise UserError(
                f"this tokenizer sees {length} text tokens; give task.text_features=<safetensors file with features "
                f"[{num_classes}, {length}, {dim}]>, or train without text: tokenizer.text_length=0"
            )
        return None
    if not length:
        raise UserError("task.text_features has no effect on a tokenizer with text_length=0; leave it out")
    features = read_text_features(path)
    if features.shape != (num_classes, length, dim):
        found = list(features.shape)
        raise UserError(f"task.text_features={path} must hold features [{num_classes}, {length}, {dim}], found {found}")
    return features


def _filled(network: Node, values: Node, owner: str) -> Node:
    for key, value in values.items():
        stated = network.get(key)
        if stated is not None and stated != value:
            raise UserError(f"tokenizer.{key}={stated} does not fit {owner}, {value}; leave it out, it is filled in")
    return {**network, **values}
