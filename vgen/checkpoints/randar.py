"""Published RandAR weights to and from our names (RandAR section 10)."""

from pathlib import Path

from vgen.checkpoints.convert import StateDict, load_strict, read_weights, rename, unwrap
from vgen.generators.transformer import Transformer

_TO_OURS = {
    "cls_embedding.": "condition.",
    "pos_instruct_embeddings": "query_embedding",
    "norm.": "norms.0.",
    "output.": "outputs.0.",
}
_TO_PUBLISHED = {ours: published for published, ours in _TO_OURS.items()}


def to_ours(state: StateDict) -> StateDict:
    """Rename published keys; caches that were saved with a model after sampling are dropped."""
    kept = {name: value for name, value in state.items() if ".kv_cache." not in name and name != "freqs_cis"}
    return rename(kept, _TO_OURS)


def to_published(state: StateDict) -> StateDict:
    """Rename our keys to the published ones."""
    return rename(state, _TO_PUBLISHED)


def load_randar(generator: Transformer, path: str | Path) -> None:
    """Load a published file such as ``randar_0.3b_llamagen_360k_bs_1024_lr_0.0004.safetensors``.

    Args:
        generator: built from the matching preset for the ``randar`` schedule.
        path: the published file, flat or nested under model, module or state_dict.

    Raises:
        UserError: for an unreadable file or any difference in names or shapes.
    """
    state = unwrap(read_weights(path), keys=("model", "module", "state_dict"), path=path)
    load_strict(generator, to_ours(state), what=str(path))
