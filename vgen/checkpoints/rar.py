"""Published RAR weights to and from our names (RAR section 7)."""

from pathlib import Path

import torch
from torch import Tensor

from vgen.checkpoints.convert import StateDict, load_strict, read_weights, rename, unwrap
from vgen.errors import UserError
from vgen.generators.transformer import Transformer

# Published position tables have rows that no sequence reaches.
SPARE_PLACES, SPARE_STEPS = 1024, 100
PREFIX = 2

_BLOCKS = {
    ".attn.qkv.": ".attention.wqkv.",
    ".attn.q_norm.": ".attention.q_norm.",
    ".attn.k_norm.": ".attention.k_norm.",
    ".attn.proj.": ".attention.wo.",
    ".norm1.": ".attention_norm.",
    ".norm2.": ".ffn_norm.",
    ".mlp.": ".feed_forward.",
    ".adaLN_modulation.1.": ".modulation.linear.",
}
_TO_OURS = {"blocks.": "layers.", "lm_head.": "outputs.0."}
_TO_PUBLISHED = {ours: published for published, ours in _TO_OURS.items()}
_HEAD = "adaln_before_head.adaLN_modulation.1."
_OUR_HEAD = "modulations.0.linear."


def to_ours(state: StateDict) -> StateDict:
    """Split the joint tables and rename.

    Raises:
        UserError: if one of the joint tables is missing or too short.
    """
    state = dict(state)
    missing = {"embeddings.weight", "pos_embed", "target_aware_pos_embed", "timesteps_embeddings", "cls_token"} - set(
        state
    )
    if missing:
        raise UserError(f"these are no RAR weights: {', '.join(sorted(missing))} missing")
    vocab = state["lm_head.weight"].shape[0]
    tokens = state["pos_embed"].shape[1] - SPARE_PLACES
    if tokens < 1 or state["timesteps_embeddings"].shape[1] != tokens + SPARE_STEPS:
        raise UserError("these are no RAR weights: the position tables have other lengths than tokens + 1024, + 100")
    joint = state.pop("embeddings.weight")
    places, targets = state.pop("pos_embed")[0], state.pop("target_aware_pos_embed")[0]
    ours = {
        "tok_embeddings.weight": joint[:vocab],
        "condition.embedding_table.weight": joint[vocab + 1 :],
        "condition.prefix": state.pop("cls_token")[0],
        "places.own.weight": places[: PREFIX + tokens],
        "places.target.weight": targets[PREFIX : PREFIX + tokens],
        "steps.weight": state.pop("timesteps_embeddings")[0, : PREFIX + tokens],
    }
    for name in ("weight", "bias"):
        ours[_OUR_HEAD + name] = _swap_halves(state.pop(_HEAD + name))
    return ours | rename({_replaced(name, _BLOCKS): value for name, value in state.items()}, _TO_OURS)


def to_published(state: StateDict) -> StateDict:
    """Join the tables again; rows that no sequence reaches are zero."""
    state = dict(state)
    words = state.pop("tok_embeddings.weight")
    own, target = state.pop("places.own.weight"), state.pop("places.target.weight")
    published = {
        "cls_token": state.pop("condition.prefix")[None],
        "embeddings.weight": torch.cat([words, _zeros(words, 1), state.pop("condition.embedding_table.weight")]),
        "pos_embed": torch.cat([own, _zeros(own, SPARE_PLACES - PREFIX)])[None],
        "target_aware_pos_embed": torch.cat([_zeros(target, PREFIX), target, _zeros(target, SPARE_PLACES - PREFIX)])[
            None
        ],
    }
    steps = state.pop("steps.weight")
    published["timesteps_embeddings"] = torch.cat([steps, _zeros(steps, SPARE_STEPS - PREFIX)])[None]
    for name in ("weight", "bias"):
        published[_HEAD + name] = _swap_halves(state.pop(_OUR_HEAD + name))
    back = {ours: theirs for theirs, ours in _BLOCKS.items()}
    return published | rename({_replaced(name, back): value for name, value in state.items()}, _TO_PUBLISHED)


def _replaced(name: str, parts: dict[str, str]) -> str:
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def _zeros(like: Tensor, rows: int) -> Tensor:
    return like.new_zeros(rows, like.shape[1])


def _swap_halves(value: Tensor) -> Tensor:
    """The published head modulates by (scale, shift), every other layer by (shift, scale)."""
    return torch.cat(value.chunk(2)[::-1])


def load_rar(generator: Transformer, path: str | Path) -> None:
    """Load a published file such as ``rar_b.bin``.

    Args:
        generator: built from the matching preset (``configs/generator/rar_*.yaml``) for the ``rar`` schedule.
        path: the published file, flat or nested under model, module or state_dict.

    Raises:
        UserError: for an unreadable file or any difference in names or shapes.
    """
    state = unwrap(read_weights(path), keys=("model", "module", "state_dict"), path=path)
    load_strict(generator, to_ours(state), what=str(path))
