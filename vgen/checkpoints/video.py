"""Turn published LARP and NAR video generators into release folders: ``python -m vgen.checkpoints.video --help``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vgen.checkpoints.larp import import_larp_tokenizer, load_larp_tokenizer
from vgen.checkpoints.larp_ar import load_larp_ar
from vgen.checkpoints.nar import load_nar_video
from vgen.checkpoints.release import save_release
from vgen.errors import reported
from vgen.generators.conditioning import ClassCondition
from vgen.generators.transformer import Transformer
from vgen.sampling.pipeline import check_compatible
from vgen.schedules.plan import Plan

Load = Callable[[Path], tuple[Transformer, dict[str, Any], Plan]]
FAMILIES: dict[str, tuple[str, Load]] = {"larp": ("raster", load_larp_ar), "nar": ("neighboring", load_nar_video)}
UCF101_FPS = 25.0


def import_generator(source: Path, family: str, tokenizer_source: Path, out: Path, *, given_frames: int) -> Path:
    """Write the release of a published video generator, its tokenizer inside and, alone, beside it.

    Args:
        source: a folder with weights and constructor arguments, or a trainer's checkpoint.
        family: a key of ``FAMILIES``.
        tokenizer_source: the LARP tokenizer whose tokens the generator knows.
        out: release folder.
        given_frames: first frames a generator of frame prediction goes on from; ignored by others.

    Raises:
        UserError: if the files do not fit, or generator and tokenizer do not fit each other.
    """
    order, load = FAMILIES[family]
    generator, config, plan = load(source)
    grid = plan.grid if len(plan.grid) > 1 else None
    tokenizer, _ = load_larp_tokenizer(tokenizer_source, nominal_grid=grid)
    check_compatible(generator, tokenizer)
    tokens = import_larp_tokenizer(tokenizer_source, out.with_name(f"{out.name}_tokenizer"), nominal_grid=grid)
    labelled = isinstance(generator.condition, ClassCondition)
    extra: dict[str, Any] = {
        "schedule": {"_target_": f"vgen.schedules.{order}.{order}", "_partial_": True},
        "given_frames": None if labelled else given_frames,
        "source": source.name,
        "data": {"fps": UCF101_FPS, **({"num_classes": config["condition"]["num_classes"]} if labelled else {})},
    }
    return save_release(out, generator, config, kind="generator", extra=extra, tokenizer=tokens)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vgen.checkpoints.video",
        description="Turn published LARP and NAR video generators into release folders for sample.py.",
        epilog="example: python -m vgen.checkpoints.video --tokenizer LARP-L-long-tokenizer --generator "
        "NAR-ucf101-256-L/last.pth --family nar --out releases/nar_video_l",
    )
    what = "a folder with weights and one .json of constructor arguments, or a trainer's checkpoint"
    parser.add_argument("--tokenizer", type=Path, required=True, help=f"LARP tokenizer: {what}")
    parser.add_argument("--generator", type=Path, required=True, help=what)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="larp")
    parser.add_argument("--given-frames", type=int, default=5, help="of a generator of frame prediction (published: 5)")
    parser.add_argument("--out", type=Path, required=True, help="release folder to write")
    chosen = parser.parse_args(arguments)
    with reported():
        release = import_generator(
            chosen.generator, chosen.family, chosen.tokenizer, chosen.out, given_frames=chosen.given_frames
        )
        print(f"release: {release}")


if __name__ == "__main__":
    main()
