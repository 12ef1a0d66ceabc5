"""Published LARP generators (arXiv 2410.21264, section 3.3), class-conditional and for frame prediction.

What NAR's video models share with them, the constructor arguments and the learned positions, is here too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vgen.checkpoints.convert import StateDict, load_strict, rename, unwrap
from vgen.checkpoints.larp import read_published
from vgen.checkpoints.release import build
from vgen.errors import UserError
from vgen.generators.transformer import Transformer
from vgen.schedules.catalog import load_plan
from vgen.schedules.plan import Plan

POSITIONS, OUR_POSITIONS = "abs_pe", "places.own.weight"
_TOKENS, _SEPARATOR = "tok_embeddings.weight", "condition.separator"
_TO_OURS = {"cls_embedding.": "condition.", "norm.": "norms.0.", "output.": "outputs.0."}
_TO_PUBLISHED = {"condition.": "cls_embedding.", "norms.0.": "norm.", "outputs.0.": "output."}


def to_ours(state: StateDict) -> StateDict:
    """Rename published keys; the last row of the token table of frame prediction is the separator."""
    ours = rename(positions_to_ours(state), _TO_OURS)
    if "condition.embedding_table.weight" not in ours:
        ours[_SEPARATOR] = ours[_TOKENS][-1].clone()
        ours[_TOKENS] = ours[_TOKENS][:-1].clone()
    return ours


def to_published(state: StateDict) -> StateDict:
    """Rename our keys to the published ones."""
    published = positions_to_published(state)
    if _SEPARATOR in published:
        separator = published.pop(_SEPARATOR)
        published[_TOKENS] = torch.cat([published[_TOKENS], separator[None]])
    return rename(published, _TO_PUBLISHED)


def positions_to_ours(state: StateDict) -> StateDict:
    """Rename the table of positions [1, rows, dim], and drop caches that were saved with a model after sampling."""
    kept = {name: value for name, value in state.items() if ".kv_cache." not in name}
    if POSITIONS in kept:
        kept[OUR_POSITIONS] = kept.pop(POSITIONS)[0]
    return kept


def positions_to_published(state: StateDict) -> StateDict:
    """Undo :func:`positions_to_ours`."""
    published = dict(state)
    if OUR_POSITIONS in published:
        published[POSITIONS] = published.pop(OUR_POSITIONS)[None]
    return published


def generator_arguments(config: Mapping[str, Any], plan: Plan, *, last_position: bool) -> dict[str, Any]:
    """Arguments of our transformer from the constructor arguments of a LARP or NAR video generator.

    Args:
        config: the published arguments; what is missing has the original's default.
        plan: decode order.
        last_position: whether the table of positions has a row for the last token (NAR) or not (LARP).

    Raises:
        UserError: for text conditions, which the original names but does not have.
    """
    if config.get("model_type", "class_cond") not in ("class_cond", "c2i"):
        raise UserError(f"model_type={config['model_type']} is not supported; published models are class_cond")
    dim = config["dim"]
    condition = {"_target_": "vgen.generators.conditioning.ClassCondition", "num_classes": config.get("num_classes")}
    if config.get("frame_prediction"):
        condition = {
            "_target_": "vgen.generators.conditioning.TokenCondition",
            "num_tokens": plan.num_condition - 1,
        }
    return {
        "_target_": "vgen.generators.transformer.Transformer",
        "vocab_size": config["vocab_size"],
        "grid": list(plan.grid),
        "condition": {**condition, "dim": dim},
        "dim": dim,
        "depth": config["n_layer"],
        "heads": config["n_head"],
        "kv_heads": config.get("n_kv_head"),
        "ffn_multiplier": config.get("ffn_dim_multiplier"),
        "ffn_multiple_of": config.get("multiple_of", 256),
        "norm_eps": config.get("norm_eps", 1e-5),
        "rope": "none",
        "positions": "sincos" if config.get("use_fixed_pe") else "own",
        "last_position": last_position,
        "token_dropout": config.get("token_dropout_p", 0.1),
        "attention_dropout": config.get("attn_dropout_p", 0.0),
        "residual_dropout": config.get("resid_dropout_p", 0.1),
        "ffn_dropout": config.get("ffn_dropout_p", 0.1),
        "drop_path": config.get("drop_path_rate", 0.0),
        "num_readouts": plan.num_heads,
    }


def plan_of(config: Mapping[str, Any]) -> Plan:
    """The raster plan of a LARP generator: N tokens in one row behind the condition."""
    return load_plan("raster", (config["max_seq_len"],), {"num_condition": config.get("cls_token_num", 1)})


def load_larp_ar(path: str | Path) -> tuple[Transformer, dict[str, Any], Plan]:
    """Build and load a published generator.

    Args:
        path: a folder with one weight file and its ``config.json`` as on the hub (``LARP-L-long-AR``), or a trainer's
            checkpoint that holds both.

    Returns:
        The generator in eval mode, its configuration, and the plan it was trained for.

    Raises:
        UserError: for missing or unreadable files, unsupported options, and any difference in names or shapes.
    """
    file, config, content = read_published(path)
    try:
        plan = plan_of(config)
        network = generator_arguments(config, plan, last_position=False)
    except KeyError as error:
        raise UserError(f"{path} does not describe a LARP generator ({error} is missing)") from error
    generator = build(network)
    assert isinstance(generator, Transformer)
    load_strict(generator, to_ours(unwrap(content, keys=("sd",), path=file)), what=str(file))
    return generator.eval(), network, plan
