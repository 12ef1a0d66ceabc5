"""CLIP score: how well pictures fit their captions (Hessel et al. 2021, arXiv 2104.08718).

An extra beside the scores of pictures alone; needs the extra ``clip`` (transformers) and a local CLIP in the layout of
the Hugging Face hub. Text-to-image papers use ViT-B/32 (``openai/clip-vit-base-patch32``).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen.checkpoints.release import file_sha256
from vgen.errors import UserError
from vgen.evaluation.features import full_float32

CLIP_FILES = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class ClipScorer:
    """A frozen CLIP with its own image preparation and tokenizer.

    Attributes:
        model: transformers' ``CLIPModel``.
        processor: transformers' ``CLIPProcessor``.
        name: name of its folder.
        file: weights.
        sha256: of the weights.
        device: where the network lives.
    """

    model: Any
    processor: Any
    name: str
    file: Path
    sha256: str
    device: torch.device

    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine between the embeddings of pictures and captions.

        Args:
            pictures: uint8 [B, 3, H, W].
            captions: B texts; those longer than the model's context are cut at its end.

        Returns:
            float64 [B] in [-1, 1]. The published score is their mean; torchmetrics multiplies by 100 and clips at 0.

        Raises:
            UserError: if pictures are not 8-bit or there is not one caption for each.
        """
        if pictures.dtype != torch.uint8:
            raise UserError(f"pictures to score must be uint8 0..255, not {pictures.dtype}")
        if len(pictures) != len(captions):
            raise UserError(f"CLIP score needs one caption per picture; there are {len(captions)} for {len(pictures)}")
        images = [picture.permute(1, 2, 0).numpy() for picture in pictures.cpu()]
        inputs = self.processor(
            text=list(captions),
            images=images,
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
        ).to(self.device)
        with torch.inference_mode(), full_float32():
            output = self.model(**inputs)
        image, text = (
            torch.nn.functional.normalize(x.double(), dim=1) for x in (output.image_embeds, output.text_embeds)
        )
        return (image * text).sum(1).cpu()

    def describe(self) -> dict:
        """What a report must say about the scorer."""
        return {"name": self.name, "file": str(self.file), "sha256": self.sha256}


def load_clip(folder: Path, *, device: torch.device) -> ClipScorer:
    """Load CLIP from a local folder; nothing is downloaded.

    Args:
        folder: holds :data:`CLIP_FILES`, one of :data:`WEIGHT_FILES` and the tokenizer's vocabulary.
        device: where to run it.

    Raises:
        UserError: if transformers is not installed, or files are missing or damaged.
    """
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise UserError("metric clip_score needs transformers: pip install vgen[clip]") from error
    weights = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    missing = [name for name in CLIP_FILES if not (folder / name).is_file()]
    missing += [] if weights else [" or ".join(WEIGHT_FILES)]
    if missing:
        raise UserError(
            f"metric clip_score: {folder} lacks {', '.join(missing)}; put a copy of the hub repository "
            f"openai/clip-vit-base-patch32 there (nothing is downloaded)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
            processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise UserError(
            f"metric clip_score: {folder} cannot be loaded ({' '.join(str(error).split())[:200]})"
        ) from error
    model = model.to(device).eval().requires_grad_(False)
    return ClipScorer(model, processor, folder.name, weights[0], file_sha256(weights[0]), device)
