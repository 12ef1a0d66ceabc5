"""Clips longer than a generator was trained for, window by window with an overlap in time."""

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.sampling.decode import decode
from vgen.sampling.overlap import upload
from vgen.sampling.pipeline import Pipeline
from vgen.sampling.settings import Sampling
from vgen.schedules.plan import Plan
from vgen.tokenizers.causal3d import Causal3D, token_frames

_WINDOW_SEED = 1 << 40


class LongPipeline(Pipeline):
    """Decodes a clip, then goes on from its last frames as often as needed.

    A generator that predicts frames is given them as its condition. A generator conditioned on labels needs a causal
    tokenizer: the overlapping frames are encoded again, their tokens are the first ones of the next clip, and these are
    known tokens, kept while the rest is decoded. Orders that go frame by frame (raster, parallel, zipar) decide every
    new token in view of all known ones, as orders that ask by position do; the neighboring order decides the first
    tokens of new frames before the last known ones are fed, as in training.

    Args:
        num_frames: frames of a clip.
        overlap: frames of a window that the next one goes on from; null = one and a step of the tokenizer in time
            (label-conditional) or as trained (frame prediction).
        parts: arguments of :class:`vgen.sampling.pipeline.Pipeline`.

    Raises:
        UserError: for numbers of frames that do not fit, or a tokenizer whose clips cannot be continued.
    """

    def __init__(self, *, num_frames: int, overlap: int | None, **parts: Any) -> None:
        super().__init__(**parts)
        window = self.tokenizer.num_frames
        if window is None or num_frames < window:
            raise UserError(f"num_frames={num_frames} must be at least the {window} frames of the tokenizer's clips")
        self.overlap = self._checked_overlap(overlap, window)
        self.length = num_frames
        # Replaced for orders that must know how many tokens are given.
        self.next_plan: Plan = self.plan

    def _checked_overlap(self, overlap: int | None, window: int) -> int:
        if self.start is not None:
            if overlap not in (None, self.given_frames):
                raise UserError(f"overlap={overlap}: this generator goes on from {self.given_frames} frames")
            return self.given_frames
        if self.given is not None:
            raise UserError("edit and num_frames cannot be combined")
        if not isinstance(self.tokenizer, Causal3D):
            raise UserError(
                "num_frames: the tokens of this tokenizer belong to no frame, so its clips are continued by a "
                "generator trained for frame prediction only"
            )
        return default_overlap(self.tokenizer, window) if overlap is None else checked_overlap(self.tokenizer, overlap)

    @property
    def num_frames(self) -> int | None:
        """Frames of a sample."""
        return self.length

    def decode_pixels(self, ids: Tensor, labels: Tensor, sample_index: Tensor, sampling: Sampling) -> Tensor:
        """Pixels float32 [B, 3, num_frames, H, W], not clamped; the ids are those of the first window."""
        clips, number = super().decode_pixels(ids, labels, sample_index, sampling), 0
        while clips.shape[2] < self.length:
            number += 1
            # Every window draws from numbers of its own.
            fresh = replace(sampling, seed=sampling.seed + number * _WINDOW_SEED)
            following = self._continued(clips[:, :, -self.overlap :].clamp(-1, 1), labels, sample_index, fresh)
            clips = torch.cat([clips, following[:, :, self.overlap :]], dim=2)
        return clips[:, :, : self.length]

    def _continued(self, frames: Tensor, labels: Tensor, sample_index: Tensor, sampling: Sampling) -> Tensor:
        """The window float32 [B, 3, T, H, W] that begins with frames [B, 3, overlap, H, W]."""
        known_ids = known = None
        condition, plan = upload(labels, self.device), self.plan
        if self.start is not None:
            condition = self.frame_tokens(frames)
        else:
            first, plan = self.tokenizer.encode(frames), self.next_plan
            known_ids = first.new_zeros(len(first), plan.num_tokens)
            known_ids[:, : first.shape[1]] = first
            known = torch.arange(plan.num_tokens, device=first.device).expand_as(known_ids) < first.shape[1]
        ids = decode(
            self.generator,
            plan,
            condition,
            sampling=sampling,
            sample_index=upload(sample_index, self.device),
            known_ids=known_ids,
            known=known,
        )
        return self.pixel_decoder(ids, upload(sample_index, ids.device), sampling.seed)


def default_overlap(tokenizer: Causal3D, window: int) -> int:
    """One frame and one step of the tokenizer in time, which show motion; one frame where a clip has no more."""
    return 1 + tokenizer.time_stride if window > 1 + tokenizer.time_stride else 1


def checked_overlap(tokenizer: Causal3D, overlap: int) -> int:
    """An overlap the tokenizer can encode and that leaves frames to decode.

    Raises:
        UserError: naming what is possible.
    """
    if not 1 <= overlap < (tokenizer.num_frames or 0):
        raise UserError(f"overlap={overlap} must lie in 1..{(tokenizer.num_frames or 0) - 1}")
    token_frames(overlap, tokenizer.time_stride)
    return overlap


def overlapping_tokens(tokenizer: Causal3D, overlap: int) -> int:
    """Tokens of the first ``overlap`` frames of a clip."""
    return token_frames(overlap, tokenizer.time_stride) * prod(tokenizer.grid[1:])
