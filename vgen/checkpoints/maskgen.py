"""Published MaskGen generators (TA-TiTok, arXiv 2501.07730) to and from our names (titok.md section 11).

Their blocks are the ``JointTransformerBlock`` of diffusers: the token's stream is ``to_*`` and ``ff``, the text's is
``add_*`` and ``ff_context``. Its norms order their modulation as (shift, scale, gate, ...) where a block goes on, and
as (scale, shift) at an end: there the halves change places.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from vgen.checkpoints.convert import StateDict, load_strict, read_weights, rename, unwrap
from vgen.errors import UserError
from vgen.generators.transformer import Transformer

_VQ = {
    "text_embed_proj.": "condition.text.",
    "cond_pooled_proj.": "condition.pooled.",
    "blocks.": "layers.",
    "norm.": "modulations.0.",
}
_KL = {
    "text_emb.": "condition.text.",
    "text_pooled_emb.": "condition.pooled.",
    "decoder_blocks.": "layers.",
    "decoder_norm.": "modulations.0.",
    "z_proj.": "tok_embeddings.projection.",
    "z_proj_ln.": "tok_embeddings.norm.",
    "diffloss.net.time_embed.mlp.": "latent_head.net.time_mlp.",
    "diffloss.net.cond_embed.": "latent_head.net.condition_embedding.",
    "diffloss.net.input_proj.": "latent_head.net.input.",
    "diffloss.net.res_blocks.": "latent_head.net.blocks.",
    "diffloss.net.final_layer.linear.": "latent_head.net.output.",
    "diffloss.net.final_layer.modulation.": "latent_head.net.modulation.",
}
# Tables and vectors with axes in front that ours do not have.
_KL_TABLES = {
    "decoder_pos_embed_learned": ("places.own.weight", 1),
    "diffusion_pos_embed_learned": ("latent_head.places.weight", 1),
    "mask_token": ("tok_embeddings.mask_token", 2),
}
_INNER = {
    ".norm1.linear.": ".tokens.modulation.linear.",
    ".norm1_context.linear.": ".text.modulation.linear.",
    ".attn.to_out.0.": ".tokens.attention.wo.",
    ".attn.to_add_out.": ".text.attention.wo.",
    ".ff.net.0.proj.": ".tokens.feed_forward.fc1.",
    ".ff.net.2.": ".tokens.feed_forward.fc2.",
    ".ff_context.net.0.proj.": ".text.feed_forward.fc1.",
    ".ff_context.net.2.": ".text.feed_forward.fc2.",
    ".in_ln.": ".norm.",
    ".adaLN_modulation.1.": ".modulation.linear.",
}
_PROJECTIONS = {
    "tokens": ("to_q", "to_k", "to_v"),
    "text": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
_WORDS, _HEAD = "embeddings.weight", "lm_head.weight"
# Rows of the published token table behind the codes and the mask token, which nothing uses.
SPARE_ROWS = 1001


def to_ours(state: StateDict) -> StateDict:
    """Rename, join projections, swap the halves of closing modulations, and cut the unused rows of the token table.

    Raises:
        UserError: if these are neither weights of MaskGen on codes (VQ) nor of MaskGen on latents (KL).
    """
    state = dict(state)
    if {_WORDS, _HEAD, "pos_embed"} <= set(state):
        words, head = state.pop(_WORDS), state.pop(_HEAD)
        # On the meta device there is nothing to compare.
        if words.shape != head.shape or not (words.is_meta or torch.equal(words, head)):
            raise UserError(f"these are no MaskGen weights: {_HEAD} must be tied to {_WORDS}")
        if len(words) <= SPARE_ROWS + 1:
            raise UserError(f"these are no MaskGen weights: {_WORDS} has no more than {SPARE_ROWS + 1} rows")
        ours = {
            "tok_embeddings.weight": words[: len(words) - SPARE_ROWS],
            "places.own.weight": state.pop("pos_embed").squeeze(0),
        }
        names = _VQ
    elif set(_KL_TABLES) <= set(state):
        ours = {name: state.pop(theirs)[(0,) * axes] for theirs, (name, axes) in _KL_TABLES.items()}
        names = _KL
    else:
        raise UserError("these are no MaskGen weights: neither the tables of the VQ nor of the KL models are there")
    renamed = rename({_replaced(name, _INNER): value for name, value in _joined(state).items()}, names)
    return ours | _swapped(renamed)


def to_published(state: StateDict) -> StateDict:
    """Undo :func:`to_ours`; the unused rows of the token table become zero."""
    state = _swapped(dict(state))
    published: StateDict = {}
    if "tok_embeddings.weight" in state:
        words = state.pop("tok_embeddings.weight")
        words = torch.cat([words, words.new_zeros(SPARE_ROWS, words.shape[1])])
        published |= {_WORDS: words, _HEAD: words, "pos_embed": state.pop("places.own.weight")[None]}
        names = _VQ
    else:
        published |= {theirs: state.pop(name)[(None,) * axes] for theirs, (name, axes) in _KL_TABLES.items()}
        names = _KL
    back = _inverse(names)
    for name, value in state.items():
        if found := re.fullmatch(r"(layers\.\d+)\.(tokens|text)\.attention\.wqkv\.(\w+)", name):
            layer, stream, kind = found.groups()
            for part, chunk in zip(_PROJECTIONS[stream], value.chunk(3), strict=True):
                published |= rename({f"{layer}.attn.{part}.{kind}": chunk}, back)
        else:
            theirs = next(iter(rename({name: value}, back)))
            published[_replaced(theirs, _inverse(_INNER))] = value
    return published


def denoiser_to_ours(state: StateDict) -> StateDict:
    """The diffusion network alone, as MAR names it (``net.*`` without the prefix)."""
    renamed = rename({_replaced(f"diffloss.net.{name}", _INNER): value for name, value in state.items()}, _KL)
    return {name.removeprefix("latent_head.net."): value for name, value in renamed.items()}


def _joined(state: StateDict) -> StateDict:
    """One query-key-value projection per stream instead of three."""
    joined: dict[str, dict[str, Tensor]] = {}
    rest: StateDict = {}
    for name, value in state.items():
        for stream, parts in _PROJECTIONS.items():
            if found := re.fullmatch(rf"(.+)\.attn\.({'|'.join(parts)})\.(\w+)", name):
                layer, part, kind = found.groups()
                joined.setdefault(f"{layer}.{stream}.attention.wqkv.{kind}", {})[part] = value
                break
        else:
            rest[name] = value
    for name, found_parts in joined.items():
        wanted = _PROJECTIONS["text" if ".text." in name else "tokens"]
        if missing := [part for part in wanted if part not in found_parts]:
            raise UserError(f"these are no MaskGen weights: {missing[0]} of {name} is missing")
        rest[name] = torch.cat([found_parts[part] for part in wanted])
    return rest


def _swapped(state: StateDict) -> StateDict:
    """Modulations that close a stream, (scale, shift) in the published files and (shift, scale) in ours, turned."""
    numbers = [int(name.split(".")[1]) for name in state if name.startswith("layers.")]
    closing = (f"layers.{max(numbers, default=-1)}.text.modulation.linear.", "modulations.0.linear.")
    return {name: torch.cat(v.chunk(2)[::-1]) if name.startswith(closing) else v for name, v in state.items()}


def _inverse(names: dict[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in names.items()}


def _replaced(name: str, parts: dict[str, str]) -> str:
    """Replace the first part that occurs."""
    for old, new in parts.items():
        if old in name:
            return name.replace(old, new)
    return name


def load_maskgen(generator: Transformer, path: str | Path) -> None:
    """Load a published file such as ``maskgen_vq_l.bin``.

    Args:
        generator: built from the matching preset (``configs/generator/maskgen_*.yaml``).
        path: the published file, a flat state dict (``.bin`` or ``.safetensors``).

    Raises:
        UserError: for an unreadable file or any difference in names or shapes.
    """
    state = unwrap(read_weights(path), keys=("model", "ema", "state_dict"), path=path)
    load_strict(generator, to_ours(state), what=str(path))
