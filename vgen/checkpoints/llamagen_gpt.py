"""Published LlamaGen GPT weights (c2i and t2i) to and from our names (LlamaGen section 9)."""

from pathlib import Path

from vgen.checkpoints.convert import StateDict, load_strict, read_weights, rename, unwrap
from vgen.generators.transformer import Transformer

_TO_OURS = {
    "cls_embedding.cap_proj.": "condition.",
    "cls_embedding.": "condition.",
    "norm.": "norms.0.",
    "output.": "outputs.0.",
}
_TO_PUBLISHED = {
    "condition.fc": "cls_embedding.cap_proj.fc",
    "condition.": "cls_embedding.",
    "norms.0.": "norm.",
    "outputs.0.": "output.",
}


def to_ours(state: StateDict) -> StateDict:
    """Rename published keys; the recomputed rotary buffer that old files carry is dropped."""
    return rename({name: value for name, value in state.items() if name != "freqs_cis"}, _TO_OURS)


def to_published(state: StateDict) -> StateDict:
    """Rename our keys to the published ones."""
    return rename(state, _TO_PUBLISHED)


def load_llamagen_gpt(generator: Transformer, path: str | Path) -> None:
    """Load a published file such as ``c2i_L_256.pt`` or ``t2i_XL_stage1_256.pt``.

    Args:
        generator: built from the matching preset.
        path: the published file; the state dict may be nested under model, module or state_dict, or flat.

    Raises:
        UserError: for an unreadable file or any difference in names or shapes.
    """
    state = unwrap(read_weights(path), keys=("model", "module", "state_dict"), path=path)
    load_strict(generator, to_ours(state), what=str(path))
