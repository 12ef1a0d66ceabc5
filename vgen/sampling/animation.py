"""A real decode as an animation: pictures growing cell by cell, beside the order that decides them."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision.utils import make_grid

from vgen.errors import UserError
from vgen.media import strips
from vgen.pixels import to_uint8
from vgen.sampling.pipeline import Pipeline
from vgen.sampling.settings import Sampling
from vgen.schedules.picture import draw_passes
from vgen.tokenizers.causal3d import Causal3D

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_FRAMES, FRAME_MS, SIDE, GREY = 96, 120, 128, 200
_STRIP = 9  # frames of a clip shown at once


@torch.inference_mode()
def animate(pipeline: Pipeline, labels: Tensor, sample_index: Tensor, sampling: Sampling, path: Path) -> Path:
    """Decode samples and write a GIF of it.

    Cells that are not decided yet are grey, where tokens lie on the picture; clips are shown as strips of frames. The
    order shown is that of the first sample. Long decodes are shown in at most 96 frames.

    Args:
        pipeline: what to decode with.
        labels: int64 [B].
        sample_index: int64 [B].
        sampling: settings.
        path: file to write, ``.gif``.

    Raises:
        UserError: if the file cannot be written.
    """
    from PIL import Image

    states: list[Tensor] = []
    pipeline.generate_ids(labels, sample_index, sampling, watch=lambda _, ids: states.append(ids.clone()))
    passes = len(states)
    undecided = torch.stack([_undecided(state)[0] for state in states])
    step = undecided.sum(0).cpu()
    shown = sorted({round(i * (passes - 1) / max(1, MOST_FRAMES - 1)) for i in range(MOST_FRAMES)})
    frames = []
    for number in shown:
        pictures = _pictures(pipeline, states[number], labels, sample_index, sampling.seed)
        order = draw_passes(step, pipeline.plan.grid, passes=passes, until=number)
        height = max(order.height, pictures.height)
        frame = Image.new("RGB", (order.width + pictures.width + 8, height), (255, 255, 255))
        frame.paste(order, (0, (height - order.height) // 2))
        frame.paste(pictures, (order.width + 8, (height - pictures.height) // 2))
        frames.append(frame)
    times = [FRAME_MS] * (len(frames) - 1) + [FRAME_MS + 2000]
    try:
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); free space or choose another out") from error
    return path


def _undecided(tokens: Tensor) -> Tensor:
    """Where ids [B, N] are negative or latents [B, N, C] not numbers, bool [B, N]."""
    return tokens.isnan().any(-1) if tokens.is_floating_point() else tokens < 0


def _pictures(pipeline: Pipeline, ids: Tensor, labels: Tensor, sample_index: Tensor, seed: int) -> "Image":
    """What is decided so far, as one PIL picture of a grid."""
    from PIL import Image

    undecided = _undecided(ids)
    decided = int((~undecided[0]).sum())
    known = ids.nan_to_num() if ids.is_floating_point() else ids.clamp(min=0)
    if pipeline.tokenizer.decodes_prefixes and not bool(undecided[:, :decided].any()):
        known = known[:, :decided]
    tokens, text = pipeline.for_tokenizer(known, labels)
    pixels = to_uint8(pipeline.tokenizer.decode_samples(tokens, sample_index.to(ids.device), seed, text)).cpu()
    pixels = _greyed(pixels, undecided.cpu(), pipeline)
    columns = max(1, round(len(pixels) ** 0.5))
    if pixels.dim() == 5:
        pixels, columns = strips(pixels, most=_STRIP)
    scale = max(1, (SIDE if pipeline.num_frames is None else SIDE // 2) // pixels.shape[-1])
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    sheet = make_grid(pixels, nrow=columns, padding=4, pad_value=255)
    return Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy())


def _greyed(pixels: Tensor, undecided: Tensor, pipeline: Pipeline) -> Tensor:
    """Pixels uint8 with the cells of undecided tokens bool [B, N] in grey, where tokens have cells."""
    grid, tokenizer = pipeline.plan.grid, pipeline.tokenizer
    if len(grid) == 2:
        undecided = undecided.view(-1, 1, *grid)
    elif isinstance(tokenizer, Causal3D):
        undecided = undecided.view(-1, 1, *grid)
        # The first token frame shows one frame, every other a step of the tokenizer in time.
        later = undecided[:, :, 1:].repeat_interleave(tokenizer.time_stride, 2)
        undecided = torch.cat([undecided[:, :, :1], later], dim=2)
    else:
        return pixels
    rows, columns = pixels.shape[-2] // grid[-2], pixels.shape[-1] // grid[-1]
    hidden = undecided.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return pixels.masked_fill(hidden, GREY)
