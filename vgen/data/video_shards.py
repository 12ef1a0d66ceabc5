"""Videos in tar files as webdataset writes them: ``<key>.mp4`` beside ``<key>.cls`` or ``<key>.json``.

The members are read in place through an index, not streamed, so that shards have the same keyed random order and the
same exact resumption as all other data.
"""

import io
import json
import re
import tarfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgen.data.source import DataSource
from vgen.data.video_clips import ClipOptions, video_source
from vgen.data.video_folder import VIDEOS
from vgen.errors import UserError
from vgen.runtime import track

LABEL_MEMBERS = (".cls", ".json", ".txt")


@dataclass(frozen=True)
class _Member:
    shard: Path
    key: str
    start: int
    size: int


@dataclass(frozen=True)
class ShardVideos:
    """Videos inside tar files; fulfils :class:`vgen.data.video_index.VideoReader`.

    Attributes:
        members: where each video lies.
    """

    members: tuple[_Member, ...]

    def __len__(self) -> int:
        return len(self.members)

    def open(self, index: int) -> io.BytesIO:
        """The bytes of one video."""
        member = self.members[index]
        with member.shard.open("rb") as file:
            file.seek(member.start)
            return io.BytesIO(file.read(member.size))

    def name(self, index: int) -> str:
        """Shard and member."""
        member = self.members[index]
        return f"{member.shard}:{member.key}"

    def state(self, index: int) -> str:
        """Place in the shard, and when the shard was last changed."""
        member = self.members[index]
        return f"{member.start} {member.size} {member.shard.stat().st_mtime_ns}"

    def fingerprint(self) -> str:
        """Hash of shard names, member names and sizes."""
        facts = (f"{member.shard.name} {member.key} {member.size}" for member in self.members)
        return sha256("\n".join(facts).encode()).hexdigest()


def video_shards(
    *,
    path: str,
    val_path: str | None,
    label_key: str,
    num_classes: int | None,
    class_names: list[str] | None,
    val_fraction: float,
    **options: Any,
) -> DataSource:
    """Read webdataset shards of videos.

    Args:
        path: a folder of ``*.tar``, a pattern such as ``/data/train-*.tar``, or one with numbers in braces such as
            ``/data/train-{000000..000146}.tar``.
        val_path: likewise, for validation; None to set ``val_fraction`` of the training videos aside.
        label_key: entry of ``<key>.json`` that holds the class number; ``<key>.cls`` and ``<key>.txt`` hold it alone.
        num_classes: None to take it from the labels.
        class_names: None to number the classes.
        val_fraction: used without ``val_path``.
        options: see :class:`vgen.data.video_clips.ClipOptions`.

    Raises:
        UserError: if there is no shard, a shard is damaged, or a video lacks its label.
    """
    train = _members(path, "data.path", label_key)
    val = None if val_path is None else _members(val_path, "data.val_path", label_key)
    return video_source(
        name=Path(path).parent.name or "shards",
        where=path,
        train=train,
        val=val,
        num_classes=num_classes,
        class_names=class_names,
        val_fraction=val_fraction,
        options=ClipOptions(**options),
    )


def shard_files(pattern: str, key: str) -> list[Path]:
    """Tar files that a folder, pattern or numbered range names, sorted.

    Raises:
        UserError: if there is none, or one of a range is missing.
    """
    place = Path(pattern).expanduser()
    numbered = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", str(place))
    if numbered:
        head, first, last, tail = numbered.groups()
        files = [Path(f"{head}{number:0{len(first)}d}{tail}") for number in range(int(first), int(last) + 1)]
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise UserError(f"{key}={pattern}: {missing} does not exist; copy it or correct the range")
    elif place.is_dir():
        files = sorted(place.glob("*.tar"))
    else:
        files = sorted(place.parent.glob(place.name))
    if not files:
        raise UserError(f"{key}={pattern} names no tar file; give a folder, a pattern or a range of shards")
    return files


def _members(pattern: str, key: str, label_key: str) -> tuple[ShardVideos, Tensor]:
    videos: list[_Member] = []
    labels: list[int] = []
    for shard in track(shard_files(pattern, key), "looking at shards", unit="shard"):
        found, numbers = _read_shard(shard, label_key)
        videos += found
        labels += numbers
    if not videos:
        raise UserError(f"{key}={pattern}: the shards hold no video ({' '.join(sorted(VIDEOS.extensions))})")
    return ShardVideos(tuple(videos)), torch.tensor(labels)


def _read_shard(shard: Path, label_key: str) -> tuple[list[_Member], list[int]]:
    """Videos of one shard and their labels."""
    videos: dict[str, _Member] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for entry in tar:
                # webdataset's rule: the key ends at the first dot of the file name.
                folder, _, file = entry.name.rpartition("/")
                stem, _, extension = file.partition(".")
                sample = f"{folder}/{stem}" if folder else stem
                if not entry.isfile():
                    continue
                if VIDEOS.matches(f"x.{extension}"):
                    videos[sample] = _Member(shard, entry.name, entry.offset_data, entry.size)
                elif f".{extension}" in LABEL_MEMBERS and sample not in labels:
                    content = tar.extractfile(entry)
                    assert content is not None
                    labels[sample] = _label(content.read(), extension, label_key, f"{shard}:{entry.name}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{shard} cannot be read ({error}); it is damaged or compressed: copy it again") from error
    unlabelled = next((sample for sample in videos if sample not in labels), None)
    if unlabelled is not None:
        members = " or ".join(f"{unlabelled}{end}" for end in LABEL_MEMBERS)
        raise UserError(f"{shard}: {videos[unlabelled].key} has no label ({members})")
    return list(videos.values()), [labels[sample] for sample in videos]


def _label(content: bytes, extension: str, label_key: str, name: str) -> int:
    try:
        return int(json.loads(content)[label_key] if extension == "json" else content)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name} holds no class number ({error}); set data.label_key for JSON labels") from error
