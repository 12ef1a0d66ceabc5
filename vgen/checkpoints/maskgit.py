"""Published MaskGIT-style generators of TiTok to and from our names (maskgit.md sections 3 and 8)."""

import re
from pathlib import Path

import torch

from vgen.checkpoints.convert import StateDict, load_strict, read_weights, rename, unwrap
from vgen.errors import UserError
from vgen.generators.transformer import Transformer

_WORDS, _PLACES = "model.embeddings.word_embeddings.weight", "model.embeddings.position_embeddings.weight"
_TYPES, _BUFFER = "model.embeddings.token_type_embeddings.weight", "model.embeddings.position_ids"
_VIT = {
    "model.embeddings.LayerNorm.": "embedding_norm.",
    "model.encoder.layer.": "layers.",
    "model.lm_head.": "outputs.0.",
}
_VIT_BLOCKS = {
    ".attention.output.dense.": ".attention.wo.",
    ".attention.output.LayerNorm.": ".attention_norm.",
    ".intermediate.dense.": ".feed_forward.fc1.",
    ".output.dense.": ".feed_forward.fc2.",
    ".output.LayerNorm.": ".ffn_norm.",
}
_PARTS = ("query", "key", "value")
_UVIT = {"norm.": "norms.0.", "lm_head.": "outputs.0."}
_UVIT_BLOCKS = {
    ".attn.qkv.": ".attention.wqkv.",
    ".attn.proj.": ".attention.wo.",
    ".norm1.": ".attention_norm.",
    ".norm2.": ".ffn_norm.",
    ".mlp.": ".feed_forward.",
    ".skip_linear.": ".skip.",
}


def to_ours(state: StateDict) -> StateDict:
    """Rename, split the joint table of tokens, mask and classes, and join projections.

    Raises:
        UserError: if these are neither weights of the ViT nor of the UViT generator.
    """
    state = dict(state)
    if {_WORDS, _PLACES, _TYPES, "model.lm_head.weight"} <= set(state):
        return _vit_to_ours(state)
    if {"embeddings.weight", "pos_embed", "lm_head.weight"} <= set(state):
        return _uvit_to_ours(state)
    raise UserError("these are no MaskGIT weights: neither the tables of the ViT nor those of the UViT are there")


def to_published(state: StateDict) -> StateDict:
    """Undo :func:`to_ours`; the token types of the ViT, which are part of our positions, become zero."""
    state = dict(state)
    words = torch.cat([state.pop("tok_embeddings.weight"), state.pop("condition.embedding_table.weight")])
    places = state.pop("places.own.weight")
    if "embedding_norm.weight" not in state:
        return {"embeddings.weight": words, "pos_embed": places[None]} | _uvit_to_published(state)
    published = {_WORDS: words, _PLACES: places, _TYPES: places.new_zeros(2, places.shape[1])}
    for name, value in state.items():
        if ".attention.wqkv." in name:
            for part, chunk in zip(_PARTS, value.chunk(3), strict=True):
                layer = rename({name: chunk}, _inverse(_VIT)).popitem()[0]
                published[layer.replace(".attention.wqkv.", f".attention.self.{part}.")] = chunk
        else:
            published |= rename({_replaced(name, _inverse(_VIT_BLOCKS)): value}, _inverse(_VIT))
    return published


def _split_words(state: StateDict, words: str, head: str) -> StateDict:
    """Tokens and the mask token, then classes and the null class."""
    joint, vocab = state.pop(words), state[head].shape[0]
    return {"tok_embeddings.weight": joint[: vocab + 1], "condition.embedding_table.weight": joint[vocab + 1 :]}


def _vit_to_ours(state: StateDict) -> StateDict:
    state.pop(_BUFFER, None)
    ours = _split_words(state, _WORDS, "model.lm_head.weight")
    ours["places.own.weight"] = state.pop(_PLACES) + state.pop(_TYPES)[0]
    joined: dict[str, StateDict] = {}
    for name in list(state):
        if found := re.fullmatch(r"(model\.encoder\.layer\.\d+\.attention)\.self\.(query|key|value)\.(\w+)", name):
            layer, part, kind = found.groups()
            joined.setdefault(f"{layer}.wqkv.{kind}", {})[part] = state.pop(name)
    for name, parts in joined.items():
        if missing := [part for part in _PARTS if part not in parts]:
            raise UserError(f"these are no MaskGIT weights: {missing[0]} of {name} is missing")
        state[name] = torch.cat([parts[part] for part in _PARTS])
    return ours | rename({_replaced(name, _VIT_BLOCKS): value for name, value in state.items()}, _VIT)


def _uvit_to_ours(state: StateDict) -> StateDict:
    ours = _split_words(state, "embeddings.weight", "lm_head.weight")
    ours["places.own.weight"] = state.pop("pos_embed")[0]
    half = len({name.split(".")[1] for name in state if name.startswith("in_blocks.")})
    for name, value in state.items():
        stem, _, rest = name.partition(".")
        number, _, inner = rest.partition(".")
        if stem == "in_blocks":
            name = f"layers.{number}.{inner}"
        elif stem == "mid_block":
            name = f"layers.{half}.{rest}"
        elif stem == "out_blocks":
            name = f"layers.{half + 1 + int(number)}.{inner}"
        ours |= rename({_replaced(name, _UVIT_BLOCKS): value}, _UVIT)
    return ours


def _uvit_to_published(state: StateDict) -> StateDict:
    numbers = {int(name.split(".")[1]) for name in state if name.startswith("layers.")}
    half = len(numbers) // 2
    published: StateDict = {}
    for name, value in state.items():
        name = _replaced(name, _inverse(_UVIT_BLOCKS))
        if name.startswith("layers."):
            number, _, inner = name.removeprefix("layers.").partition(".")
            index = int(number)
            stem = f"in_blocks.{index}" if index < half else f"out_blocks.{index - half - 1}"
            name = f"{'mid_block' if index == half else stem}.{inner}"
        published |= rename({name: value}, _inverse(_UVIT))
    return published


def _inverse(names: dict[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in names.items()}


def _replaced(name: str, parts: dict[str, str]) -> str:
    """Replace the first part that occurs; longer ones stand first."""
    for old, new in parts.items():
        if old in name:
            return name.replace(old, new)
    return name


def load_maskgit(generator: Transformer, path: str | Path) -> None:
    """Load a published file such as ``generator_titok_l32.bin``.

    Args:
        generator: built from the matching preset (``configs/generator/maskgit_*.yaml``) for the ``masked`` schedule.
        path: the published file, a flat state dict (``.bin`` or ``.safetensors``).

    Raises:
        UserError: for an unreadable file or any difference in names or shapes.
    """
    state = unwrap(read_weights(path), keys=("model", "ema", "state_dict"), path=path)
    load_strict(generator, to_ours(state), what=str(path))
