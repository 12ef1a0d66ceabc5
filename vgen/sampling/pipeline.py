"""From labels or first frames to pictures and clips: the only place where generator and tokenizer meet."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.data.video_transforms import pad_frames
from vgen.errors import UserError
from vgen.generators.conditioning import ClassCondition, TextContext, TokenCondition
from vgen.generators.joint_text import JointText
from vgen.generators.transformer import Transformer
from vgen.pixels import frames_of, from_uint8, resize_pixels, to_uint8
from vgen.random import keyed_permutation, keyed_uniform
from vgen.runtime import progress_bar, rank, world_size
from vgen.sampling.decode import Watch
from vgen.sampling.engine import Decoder, Engine
from vgen.sampling.first_frames import Start
from vgen.sampling.given import Given
from vgen.sampling.overlap import Lanes, lanes_of, upload
from vgen.sampling.pixels import PixelDecoder, PixelSettings
from vgen.sampling.prefix import passes_for
from vgen.sampling.settings import Sampling
from vgen.schedules.plan import Plan
from vgen.tokenizers.base import Tokenizer


class Pipeline:
    """A generator, the tokenizer whose ids it speaks, and the order to decode in.

    Args:
        generator: network conditioned on classes, on captions whose numbers then are the labels, or on the tokens of
            first frames.
        tokenizer: turns ids into pixels of pictures or clips.
        plan: decode order.
        picture_size: side in pixels of the pictures; null = as the tokenizer decodes them.
        given: tokens that every sample keeps; null = none.
        num_tokens: decide only the first tokens of every sample, for tokenizers that decode prefixes; null = all.
        start: first frames to go on from, for a generator conditioned on them.
        given_frames: how many of them; such a generator was trained for one number.
        unconditional: the generator was trained without labels.
        engine: how the passes run, see :class:`vgen.sampling.engine.Decoder`.
        pixels: how the tokenizer decodes.

    Raises:
        UserError: if vocabulary, grid, plan, number of tokens or condition do not fit together, for a picture size
            below 1, or for an engine that is not there.
    """

    def __init__(
        self,
        *,
        generator: Transformer,
        tokenizer: Tokenizer,
        plan: Plan,
        picture_size: int | None = None,
        given: Given | None = None,
        num_tokens: int | None = None,
        start: Start | None = None,
        given_frames: int | None = None,
        unconditional: bool = False,
        engine: Engine = "auto",
        pixels: PixelSettings | None = None,
    ) -> None:
        check_compatible(generator, tokenizer)
        generator.check_plan(plan)
        if picture_size is not None and picture_size < 1:
            raise UserError(f"picture_size={picture_size} must be at least 1 pixel, or null")
        self.generator, self.tokenizer, self.plan = generator, tokenizer, plan
        self.picture_size = picture_size or tokenizer.image_size
        self.num_tokens = num_tokens
        self.num_passes = None if num_tokens is None else passes_for(num_tokens, plan, tokenizer)
        self.given, self.start, self.unconditional = given, start, unconditional
        self.given_frames = given_frames or 0
        self.num_classes = self._check_condition()
        self.decoder = Decoder(generator, plan, engine=engine)
        self.pixel_decoder = PixelDecoder(tokenizer, pixels or PixelSettings())

    def _check_condition(self) -> int:
        """Number of classes of the labels."""
        condition = self.generator.condition
        if isinstance(condition, TokenCondition):
            if self.start is None or not self.given_frames:
                raise UserError(
                    "this generator predicts how clips go on and needs their first frames; give predict=data or "
                    "predict=video predict.file=<video>"
                )
            return self.start.num_classes
        if isinstance(condition, JointText):
            check_decoder_text(condition, self.tokenizer)
        elif not isinstance(condition, ClassCondition | TextContext):
            raise UserError("labels-to-pictures sampling needs a generator conditioned on classes or captions")
        if self.start is not None:
            raise UserError("predict has no effect: this generator is conditioned on labels, not on first frames")
        return condition.num_classes

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.generator.device

    @property
    def num_frames(self) -> int | None:
        """Frames of a sample; None for pictures."""
        return self.tokenizer.num_frames

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(H, W) of a picture or (T, H, W) of a clip, in pixels."""
        size = (self.picture_size, self.picture_size)
        return size if self.num_frames is None else (self.num_frames, *size)

    def check_labels(self, labels: Tensor) -> None:
        """Refuse labels outside 0..num_classes (num_classes asks for unconditional samples).

        Raises:
            UserError: naming the range.
        """
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) > self.num_classes):
            bad = labels[(labels < 0) | (labels > self.num_classes)][0]
            raise UserError(
                f"class label {int(bad)} is out of range: the generator knows 0..{self.num_classes - 1} "
                f"({self.num_classes} = unconditional)"
            )
        if self.unconditional and bool((labels != self.num_classes).any()):
            raise UserError("this generator was trained without labels; ask for labels=unconditional")

    def labels(self, kind: str, count: int, *, seed: int) -> Tensor:
        """Labels int64 [count] of a run as in :func:`make_labels`; those of the first frames where these are given."""
        return make_labels(kind, count, self.num_classes, seed=seed) if self.start is None else self.start.labels(count)

    def first_frames(self, sample_index: Tensor) -> Tensor:
        """The frames that samples int64 [B] go on from, float32 [B, 3, given_frames, S, S] in [-1, 1]."""
        assert self.start is not None
        frames = self.start.frames(sample_index.cpu(), count=self.given_frames, size=self.tokenizer.image_size)
        return upload(from_uint8(frames), self.device)

    def frame_tokens(self, frames: Tensor) -> Tensor:
        """The condition int64 [B, N] that says how a clip begins: frames float [B, 3, given_frames, S, S]."""
        frames_of_clip = self.tokenizer.num_frames
        assert frames_of_clip is not None
        return self.tokenizer.encode(pad_frames(frames, frames_of_clip))

    def generate_ids(
        self, labels: Tensor, sample_index: Tensor, sampling: Sampling, *, watch: Watch | None = None
    ) -> Tensor:
        """Decode ids int64 [B, N] for labels int64 [B] and sample indices int64 [B]; ``watch`` as in ``decode``.

        With ``num_tokens`` the result is [B, num_tokens]; continuous tokens are float32 [B, N, C].
        """
        self.check_labels(labels)
        given = self.given
        condition = labels if self.start is None else self.frame_tokens(self.first_frames(sample_index))
        ids = self.decoder(
            upload(condition, self.device),
            sampling=sampling,
            sample_index=upload(sample_index, self.device),
            known_ids=None if given is None else given.ids.expand(len(labels), -1),
            known=None if given is None else given.known.expand(len(labels), -1),
            num_passes=self.num_passes,
            watch=watch,
        )
        return ids[:, : self.num_tokens]

    def generate_pixels(self, labels: Tensor, sample_index: Tensor, sampling: Sampling) -> Tensor:
        """Pixels float32 [B, 3, H, W] or [B, 3, T, H, W] as the tokenizer decodes them, not clamped."""
        return self.decode_pixels(self.generate_ids(labels, sample_index, sampling), labels, sample_index, sampling)

    def decode_pixels(self, ids: Tensor, labels: Tensor, sample_index: Tensor, sampling: Sampling) -> Tensor:
        """Pixels as of :meth:`generate_pixels` of ids that :meth:`generate_ids` gave for the same arguments."""
        tokens, text = self.for_tokenizer(ids, labels)
        pixels = self.pixel_decoder(tokens, upload(sample_index, ids.device), sampling.seed, text)
        if self.start is not None and self.start.paste:
            pixels[:, :, : self.given_frames] = self.first_frames(sample_index)
        return pixels

    def for_tokenizer(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens of :meth:`generate_ids` as the tokenizer decodes them, and the text it is told of labels [B]."""
        condition, head, text = self.generator.condition, self.generator.latent_head, None
        if isinstance(condition, JointText) and self.tokenizer.text_length:
            # Looked up on the host: labels on the device would have to come back first.
            features = condition.decoder_features(labels.cpu())
            text = None if features is None else upload(features, tokens.device)
        return (tokens if head is None else tokens / head.latent_scale), text

    @torch.inference_mode()
    def generate(self, labels: Tensor, sample_index: Tensor, sampling: Sampling) -> Tensor:
        """Samples for labels int64 [B] and sample indices int64 [B].

        Returns:
            uint8 [B, 3, H, W], or [B, 3, T, H, W] of a tokenizer of clips.
        """
        return self.finish(self.generate_ids(labels, sample_index, sampling), labels, sample_index, sampling)

    @torch.inference_mode()
    def finish(self, ids: Tensor, labels: Tensor, sample_index: Tensor, sampling: Sampling) -> Tensor:
        """Samples as of :meth:`generate` of ids that :meth:`generate_ids` gave for the same arguments."""
        pixels = self.decode_pixels(ids, labels, sample_index, sampling)
        if self.picture_size != pixels.shape[-1]:
            resized = resize_pixels(frames_of(pixels), self.picture_size)
            pixels = resized if pixels.dim() == 4 else resized.unflatten(0, (len(pixels), -1)).transpose(1, 2)
        return to_uint8(pixels)

    def free_memory(self) -> None:
        """Give the device's memory back that only makes the next batch faster."""
        self.decoder.forget()
        self.pixel_decoder.forget()


def check_decoder_text(condition: JointText, tokenizer: Tokenizer) -> None:
    """Refuse captions that lack what the decoder of a text-aware tokenizer must be told.

    Raises:
        UserError: naming the tensor wanted.
    """
    length = tokenizer.text_length
    features = condition.captions.decoder_features
    if length and (features is None or features.shape[1] != length):
        found = "are none" if features is None else f"are {features.shape[1]}"
        raise UserError(
            f"the tokenizer's decoder sees {length} text features per caption and there {found}: the text features "
            f"file must hold decoder_features [captions + 1, {length}, width], for TA-TiTok CLIP's normed last layer"
        )


def check_compatible(generator: Transformer, tokenizer: Tokenizer) -> None:
    """Refuse a generator that does not speak the ids of the tokenizer.

    Raises:
        UserError: naming the two values that differ.
    """
    if generator.vocab_size != tokenizer.codebook_size:
        raise UserError(
            f"generator.vocab_size={generator.vocab_size} differs from the tokenizer's codebook of "
            f"{tokenizer.codebook_size} codes; use the tokenizer the generator was trained with"
        )
    channels = 0 if generator.latent_head is None else generator.latent_head.channels
    if channels != tokenizer.latent_channels:
        raise UserError(
            f"the generator's tokens have {channels} channels and the tokenizer's {tokenizer.latent_channels} (0 = "
            "ids); use the tokenizer the generator was trained with, and for continuous tokens one with a latent head"
        )
    if tuple(generator.grid) != tuple(tokenizer.grid):
        raise UserError(
            f"generator.grid={tuple(generator.grid)} differs from the tokenizer's grid {tuple(tokenizer.grid)}; use "
            "the tokenizer the generator was trained with, at its image size"
        )


@dataclass(frozen=True)
class SampleBatch:
    """Finished samples, on the CPU.

    Attributes:
        index: int64 [B], sample indices.
        labels: int64 [B].
        images: uint8 [B, 3, H, W] or clips [B, 3, T, H, W].
    """

    index: Tensor
    labels: Tensor
    images: Tensor


def make_labels(kind: str, count: int, num_classes: int, *, seed: int) -> Tensor:
    """Labels of a sampling run, the same for any batch size or number of processes.

    Args:
        kind: ``balanced`` (every class equally often, in a seeded mixed order), ``random`` (uniform draws, as LlamaGen
            and its descendants are scored), ``unconditional``, or class numbers joined by commas, repeated in turn.
        count: number of samples.
        num_classes: number of classes.
        seed: keys the draws.

    Returns:
        int64 [count].

    Raises:
        UserError: for an unknown kind or a class out of range.
    """
    if kind == "balanced":
        return (torch.arange(count) % num_classes)[keyed_permutation(count, seed, 1)]
    if kind == "random":
        return (keyed_uniform(seed, 2, torch.arange(count)) * num_classes).long()
    if kind == "unconditional":
        return torch.full((count,), num_classes)
    try:
        chosen = torch.tensor([int(part) for part in str(kind).split(",")])
    except ValueError as error:
        raise UserError(
            f"labels={kind} must be balanced, random, unconditional or class numbers such as 3 or 0,1,2"
        ) from error
    if int(chosen.min()) < 0 or int(chosen.max()) > num_classes:
        raise UserError(f"labels={kind}: classes are 0..{num_classes - 1} ({num_classes} = unconditional)")
    return chosen[torch.arange(count) % len(chosen)]


def sample_stream(
    pipeline: Pipeline,
    labels: Tensor,
    sampling: Sampling,
    *,
    batch_size: int,
    done: Tensor | None = None,
    split_batches: bool = False,
) -> Iterator[SampleBatch]:
    """Generate this process's share of the samples, batch by batch.

    Sample i belongs to process i mod world size; its picture depends only on (seed, i, label). On a GPU the tokens of a
    batch are decided while the pixels of the one before are decoded, see :mod:`vgen.sampling.overlap`; where memory
    does not hold both, the parts take turns.

    Args:
        pipeline: generator and tokenizer.
        labels: int64 [num_samples], labels of ALL samples.
        sampling: settings.
        batch_size: samples per batch.
        done: bool [num_samples], samples to skip because an earlier run finished them.
        split_batches: halve batches that do not fit in memory.

    Raises:
        UserError: for a label out of range, before any work; for batches that do not fit in memory unless they may be
            split, naming a size that fits.
    """
    pipeline.check_labels(labels)
    mine = torch.arange(rank(), len(labels), world_size())
    if done is not None:
        mine = mine[~done[mine]]
    unit = "img" if pipeline.num_frames is None else "clip"
    apart = pipeline.pixel_decoder.settings.beside_tokens
    with progress_bar("sampling", total=len(mine), unit=unit) as bar, lanes_of(pipeline.device, apart) as lanes:
        size, position, ahead = batch_size, 0, lanes.ahead
        started: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()
        failure: Exception | None = None
        while started or (position < len(mine) and failure is None):
            if position < len(mine) and len(started) <= ahead and failure is None:
                index, fits = mine[position : position + size], True
                try:
                    started.append((index, _start(pipeline, lanes, labels[index], index, sampling)))
                    position += len(index)
                except Exception as error:
                    fits = not _out_of_memory(error)
                    failure = error if fits else None
                if not fits:
                    # Outside of the handler, whose traceback would keep the failed batch alive.
                    lanes.wait()
                    pipeline.free_memory()
                    if started:
                        ahead = 0
                        bar.set_postfix_str("tokens and pixels in turn: memory")
                    elif len(index) == 1:
                        raise UserError("a single sample does not fit in memory; use dtype=bfloat16 or a larger device")
                    else:
                        size, ahead = (len(index) + 1) // 2, lanes.ahead
                continue
            index, ready = started.popleft()
            images = ready()
            if size < batch_size and not split_batches:
                raise UserError(
                    f"batch_size={batch_size} does not fit in memory, batch_size={size} does (found by halving); set "
                    "that, or split_batches=true to have batches split as needed"
                )
            bar.update(len(index))
            yield SampleBatch(index, labels[index], images)
        if failure is not None:
            # Only now: what was started before it is finished.
            raise failure


@torch.inference_mode()
def _start(pipeline: Pipeline, lanes: Lanes, labels: Tensor, index: Tensor, sampling: Sampling) -> Callable[[], Tensor]:
    return lanes.start(
        lambda: pipeline.generate_ids(labels, index, sampling),
        lambda ids: pipeline.finish(ids, labels, index, sampling),
    )


def _out_of_memory(error: Exception) -> bool:
    on_host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_host or isinstance(error, torch.OutOfMemoryError)
