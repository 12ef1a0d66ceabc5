"""Captions of samples, and how well the samples fit them."""

import json
from pathlib import Path

import torch

from vgen.errors import UserError
from vgen.evaluation.clip_score import ClipScorer
from vgen.evaluation.collect import read_batches
from vgen.evaluation.pictures import Pictures
from vgen.processes import Processes


def read_captions(path: Path, count: int) -> list[str]:
    """Captions in the order of the samples: a text file with one per line, or a JSON list.

    Raises:
        UserError: if the file cannot be read or does not hold one caption for each of ``count`` samples.
    """
    try:
        text = path.read_text(encoding="utf-8")
        captions = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"captions={path} cannot be read ({error}); give a text file with one caption per line"
        ) from error
    if not isinstance(captions, list) or not all(isinstance(line, str) and line.strip() for line in captions):
        raise UserError(f"captions={path} must hold one caption per sample, none of them empty")
    if len(captions) != count:
        raise UserError(f"captions={path} holds {len(captions)} captions for {count} samples; give one for each")
    return captions


def mean_clip_score(
    pictures: Pictures, captions: list[str], scorer: ClipScorer, *, batch_size: int, processes: Processes
) -> float:
    """Mean cosine of pictures and captions, the same on every process; all of them must call this."""
    total = torch.zeros(2, dtype=torch.float64)
    failure: Exception | None = None
    try:
        for batch in read_batches(pictures, batch_size=batch_size, processes=processes, description="captions"):
            cosine = scorer(batch.pictures, [captions[i] for i in batch.index.tolist()])
            total += torch.stack([cosine.sum(), torch.tensor(float(len(cosine)), dtype=torch.float64)])
    except Exception as error:  # told to the other processes before it goes on, or they would wait for ever
        failure = error
    processes.agree(failure)
    summed, count = processes.sum(total).tolist()
    return summed / count
