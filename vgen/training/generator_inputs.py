"""What a generator is trained on besides its data: the texts of a file and the tokens of its tokenizer."""

from hydra.utils import get_class
from torch import Tensor

from vgen.checkpoints.text_features import read_captions, read_text_features
from vgen.errors import UserError
from vgen.generators.joint_text import Captions, JointText
from vgen.tokenizers.base import Tokenizer
from vgen.training.settings import Node


def read_texts(generator: Node, task: Node) -> Tensor | Captions | None:
    """What the file ``task.text_features`` holds, as the generator's condition takes it; None where none is named.

    Raises:
        UserError: if the file does not hold that.
    """
    if task["text_features"] is None:
        return None
    joint = get_class(generator["condition"]["_target_"]) is JointText
    return read_captions(task["text_features"]) if joint else read_text_features(task["text_features"])


def check_tokens(generator: Node, task: Node, tokenizer: Tokenizer) -> None:
    """Refuse a generator of ids on continuous tokens or the other way round, and a cache of continuous tokens.

    Raises:
        UserError: naming what to choose instead.
    """
    continuous = generator.get("latent_head") is not None
    if continuous != bool(tokenizer.latent_channels):
        wanted = "one with a latent head, such as maskgen_kl_l" if tokenizer.latent_channels else "one without"
        kind = "continuous latents and no token ids" if tokenizer.latent_channels else "token ids"
        raise UserError(
            f"task.tokenizer={task['tokenizer']} has {kind}; use another tokenizer, or for this one another "
            f"generator=<name>: {wanted}"
        )
    if continuous and task["cache_codes"]:
        raise UserError(
            "continuous tokens are drawn anew from the posterior in every epoch and are not cached; set "
            "task.cache_codes=false"
        )
