"""What ``samples=`` and ``reference=`` may name: files, splits of the data group."""

from dataclasses import dataclass

from vgen.data.source import DataSource
from vgen.errors import UserError
from vgen.evaluation.pictures import Pictures, Subset
from vgen.evaluation.readers import DatasetPictures, open_pictures
from vgen.random import keyed_permutation

SPLITS = {"data": "train", "data.train": "train", "data.val": "val"}


@dataclass(frozen=True)
class Reference:
    """Real pictures.

    Attributes:
        pictures: all that distances of feature sets compare with.
        training: the part a classifier is fitted on and copies are looked for in.
        held_out: other real pictures, the scale of both checks.
        split: how training and held-out parts were told apart.
    """

    pictures: Pictures
    training: Pictures
    held_out: Pictures
    split: str


def open_set(where: str, *, key: str, source: DataSource | None) -> Pictures:
    """Open ``data``, ``data.train``, ``data.val``, a folder or an .npz file.

    Raises:
        UserError: if it does not exist, or names the data group when none was chosen.
    """
    if where not in SPLITS:
        return open_pictures(where, key=key, class_names=source.class_names if source else ())
    if source is None:
        raise UserError(
            f"{key}={where} names the data group but none is chosen; add data=<name>, for example data=digits"
        )
    split = SPLITS[where]
    return DatasetPictures(getattr(source, split), f"{source.name} {split}")


def open_reference(where: str, *, source: DataSource | None, seed: int) -> Reference:
    """Open the real pictures and split them for the checks that need held-out ones.

    The data group brings its own split; of a folder or file every fifth picture, drawn by ``seed``, is held out.
    """
    pictures = open_set(where, key="reference", source=source)
    if SPLITS.get(where) == "train":
        return Reference(pictures, pictures, open_set("data.val", key="reference", source=source), "data group")
    order = keyed_permutation(len(pictures), seed).tolist()
    cut = len(order) - len(order) // 5
    training = Subset(pictures, sorted(order[:cut]), f"{pictures.name} (training part)")
    held_out = Subset(pictures, sorted(order[cut:]), f"{pictures.name} (held-out part)")
    return Reference(pictures, training, held_out, f"one in five held out, seed {seed}")


def take(pictures: Pictures, count: int | None, *, key: str) -> tuple[Pictures, list[str]]:
    """The first ``count`` pictures of a set (all when None), and warnings for the report.

    Raises:
        UserError: if the set holds fewer.
    """
    if count is None or count == len(pictures):
        return pictures, []
    if count > len(pictures):
        raise UserError(f"num_samples={count} were asked for but {key}={pictures.name} holds {len(pictures)}")
    return Subset(pictures, range(count), pictures.name), [
        f"only the first {count} of {len(pictures)} samples were scored"
    ]
