"""Are samples recognised as what was asked for? A classifier fitted on a small real set answers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.evaluation.shifts import moved_copies

MAX_TRAINING_PICTURES = 20_000


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures uint8 [n, 3, H, W] with their labels int64 [n]."""

    pictures: Tensor
    labels: Tensor


def _grey(pictures: Tensor) -> Tensor:
    """Grey value of every pixel, float32 [n, H * W] in [0, 1]."""
    return pictures.float().mean(1).flatten(1) / 255


def classifier_accuracy(
    training: LabelledPictures, held_out: LabelledPictures, samples: LabelledPictures, *, shift: int
) -> dict[str, float]:
    """Accuracy of a support vector machine on samples, beside its accuracy on real pictures it has not seen.

    scikit-learn's ``SVC`` with its default radial kernel on grey pixels, fitted on the training pictures and their
    moved copies (without them it takes a digit moved by one pixel for another); about 99 % on the handwritten digits,
    and of use only for small, simple pictures.

    Args:
        training: real pictures the classifier is fitted on.
        held_out: other real pictures.
        samples: generated pictures with the labels they were asked for.
        shift: pixels by which the training pictures are moved.

    Returns:
        ``classifier_accuracy`` (samples) and ``classifier_accuracy_real`` (held-out), fractions in [0, 1].

    Raises:
        UserError: if the training set is too large for such a classifier, or has one class only.
    """
    from sklearn.svm import SVC

    copies = (2 * shift + 1) ** 2
    if len(training.pictures) * copies > MAX_TRAINING_PICTURES:
        raise UserError(
            f"metric classifier is for small sets, the reference has {len(training.pictures)} pictures in {copies} "
            f"places (at most {MAX_TRAINING_PICTURES} together); set evaluation.shift=0, or use metric accuracy with "
            f"evaluation.features=<TorchScript file>"
        )
    if len(training.labels.unique()) < 2:
        raise UserError("metric classifier needs at least 2 classes in the reference; leave it out of the metrics")
    moved = torch.cat([_grey(part) for part in moved_copies(training.pictures, shift)])
    machine = SVC(gamma="scale").fit(moved.numpy(), training.labels.repeat(copies).numpy())

    def accuracy(items: LabelledPictures) -> float:
        predicted = torch.as_tensor(machine.predict(_grey(items.pictures).numpy()))
        return float((predicted == items.labels).double().mean())

    return {"classifier_accuracy": accuracy(samples), "classifier_accuracy_real": accuracy(held_out)}
