"""Published NAR image weights (class- and text-conditional) to and from our names (NAR section 8)."""

from pathlib import Path

from vgen.checkpoints.convert import StateDict, load_strict, read_weights, rename, unwrap
from vgen.generators.transformer import Transformer

# Head 0 predicts the right neighbour; head 1, behind one more block, the one below.
_TO_OURS = {
    "cls_embedding.cap_proj.": "condition.",
    "cls_embedding.": "condition.",
    "norm.": "norms.0.",
    "output.": "outputs.0.",
    "medusa_norm.": "norms.1.",
    "medusa_output.": "outputs.1.",
}
_TO_PUBLISHED = {
    "condition.fc": "cls_embedding.cap_proj.fc",
    "condition.": "cls_embedding.",
    "norms.0.": "norm.",
    "outputs.0.": "output.",
    "norms.1.": "medusa_norm.",
    "outputs.1.": "medusa_output.",
}


def to_ours(state: StateDict) -> StateDict:
    """Rename published keys; caches that were saved with a model after sampling are dropped."""
    kept = {name: value for name, value in state.items() if ".kv_cache." not in name and name != "freqs_cis"}
    return rename(kept, _TO_OURS)


def to_published(state: StateDict) -> StateDict:
    """Rename our keys to the published ones."""
    return rename(state, _TO_PUBLISHED)


def load_nar(generator: Transformer, path: str | Path) -> None:
    """Load a published file such as ``last_version.pt`` of NAR-imagenet-256-B.

    Args:
        generator: built from the matching preset for the ``neighboring`` schedule on (H, W).
        path: the published file; the state dict may be nested under model, module or state_dict, or flat.

    Raises:
        UserError: for an unreadable file or any difference in names or shapes.
    """
    state = unwrap(read_weights(path), keys=("model", "module", "state_dict"), path=path)
    load_strict(generator, to_ours(state), what=str(path))
