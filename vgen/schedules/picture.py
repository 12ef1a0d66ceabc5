"""Pictures of decode orders: grid cells coloured by the pass that decides them, still or animated."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vgen.errors import UserError
from vgen.schedules.plan import Grid, Plan

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

MAX_SIDE = 1024
NUMBERED_CELL = 22
MARGIN, LEGEND, GAP = 8, 34, 8
BACKGROUND, UNDECIDED, GIVEN, TEXT = (255, 255, 255), (232, 232, 232), (150, 150, 150), (40, 40, 40)


def draw_passes(step: Tensor, grid: Grid, *, passes: int, until: int | None = None) -> "Image":
    """Draw which pass decides each cell, with a colour bar.

    Args:
        step: int64 [N], pass that decides each raster position, negative where the token is given.
        grid: token grid; frames of a (T, H, W) grid stand side by side, (L,) is one row.
        passes: number of passes, for the colours.
        until: show only cells decided up to this pass; null = all.

    Returns:
        An RGB picture; cells carry their pass number where it fits.
    """
    from PIL import Image, ImageDraw

    frames, rows, columns = (1,) * (3 - len(grid)) + tuple(grid)
    cell = max(2, min(28, (MAX_SIDE - GAP * (frames - 1)) // (frames * columns), MAX_SIDE // rows))
    width = max(frames * columns * cell + GAP * (frames - 1), 120)
    image = Image.new("RGB", (width + 2 * MARGIN, rows * cell + 2 * MARGIN + LEGEND), BACKGROUND)
    draw, colours = ImageDraw.Draw(image), _colours(passes)
    shown = passes - 1 if until is None else until
    for position, number in enumerate(step.tolist()):
        frame, rest = divmod(position, rows * columns)
        row, column = divmod(rest, columns)
        x, y = MARGIN + frame * (columns * cell + GAP) + column * cell, MARGIN + row * cell
        colour = GIVEN if number < 0 else colours[number] if number <= shown else UNDECIDED
        border = 1 if cell > 4 else 0
        draw.rectangle((x, y, x + cell - 1 - border, y + cell - 1 - border), fill=colour)
        if cell >= NUMBERED_CELL and 0 <= number <= shown:
            ink = BACKGROUND if sum(colour) < 384 else TEXT
            draw.text((x + cell / 2, y + cell / 2), str(number), fill=ink, anchor="mm", font_size=10)
    _draw_legend(draw, MARGIN, rows * cell + MARGIN + 10, width, colours, shown)
    return image


def _draw_legend(
    draw: "ImageDraw", x: int, y: int, width: int, colours: list[tuple[int, int, int]], shown: int
) -> None:
    """A colour bar over all passes, with the pass shown."""
    passes = len(colours)
    for offset in range(width):
        number = offset * passes // width
        draw.line((x + offset, y, x + offset, y + 7), fill=colours[number] if number <= shown else UNDECIDED)
    draw.text((x, y + 18), "pass 0", fill=TEXT, anchor="lm", font_size=10)
    draw.text((x + width, y + 18), str(passes - 1), fill=TEXT, anchor="rm", font_size=10)
    if shown < passes - 1:
        draw.text((x + width / 2, y + 18), f"now {shown}", fill=TEXT, anchor="mm", font_size=10)


def _colours(passes: int) -> list[tuple[int, int, int]]:
    """RGB of every pass, dark to bright."""
    from matplotlib import colormaps

    table = (torch.tensor(colormaps["viridis"].resampled(passes)(range(passes))) * 255).round().int()
    return [(r, g, b) for r, g, b, _ in table.tolist()]


def save_picture(plan: Plan, path: str | Path, *, frame_ms: int = 120) -> None:
    """Draw a plan into a file; ``.gif`` animates it pass by pass, other endings hold one picture.

    Args:
        plan: what to draw.
        path: where to write.
        frame_ms: time per pass of an animation; the last frame stays a second longer.

    Raises:
        UserError: if the ending is no picture format or the file cannot be written.
    """
    path, step, passes = Path(path), plan.step_of(), len(plan.forwards)
    try:
        if path.suffix.lower() == ".gif":
            frames = [draw_passes(step, plan.grid, passes=passes, until=index) for index in range(passes)]
            times = [frame_ms] * (passes - 1) + [frame_ms + 1000]
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)
        else:
            draw_passes(step, plan.grid, passes=passes).save(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the picture {path} cannot be written ({error}); use .png or .gif in a folder that exists"
        ) from error
