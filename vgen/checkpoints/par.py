"""Published PAR weights to and from our names (PAR section 10)."""

from pathlib import Path

from vgen.checkpoints.convert import StateDict, load_strict, read_weights, rename, unwrap
from vgen.generators.transformer import Transformer

_TO_OURS = {
    "cls_embedding.": "condition.",
    "spe_tok_embeddings.special_embeddings.": "learned_embeddings.",
    "norm.": "norms.0.",
    "output.": "outputs.0.",
}
_TO_PUBLISHED = {ours: published for published, ours in _TO_OURS.items()}


def to_ours(state: StateDict) -> StateDict:
    """Rename published keys."""
    return rename({name: value for name, value in state.items() if name != "freqs_cis"}, _TO_OURS)


def to_published(state: StateDict) -> StateDict:
    """Rename our keys to the published ones."""
    return rename(state, _TO_PUBLISHED)


def load_par(generator: Transformer, path: str | Path) -> None:
    """Load a published file such as ``PAR-XL-4x.pt``.

    Args:
        generator: built from the matching preset for the ``parallel`` schedule; the number of regions is the number of
            transition embeddings in the file plus one.
        path: the published file; the state dict may be nested under model, module or state_dict, or flat.

    Raises:
        UserError: for an unreadable file or any difference in names or shapes.
    """
    state = unwrap(read_weights(path), keys=("model", "module", "state_dict"), path=path)
    load_strict(generator, to_ours(state), what=str(path))
