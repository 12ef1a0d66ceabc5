"""Length and size of every video of a set, found once and remembered."""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from vgen.data.video_reader import BrokenVideoError, VideoFile, VideoInfo, probe
from vgen.runtime import locked, track, writable_folder

FORMAT = 1


class VideoReader(Protocol):
    """Numbered videos."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> VideoFile:
        """The file of one video, or its bytes; raises OSError when it is gone."""
        ...

    def name(self, index: int) -> str:
        """The name of one video in messages."""
        ...

    def state(self, index: int) -> str:
        """Changes when the file of one video does; raises OSError when it is gone."""
        ...

    def fingerprint(self) -> str:
        """Changes when videos are added, removed or reordered."""
        ...


@dataclass(frozen=True)
class VideoFiles:
    """Video files below a folder; fulfils :class:`VideoReader`.

    Attributes:
        root: common folder.
        files: paths below it.
    """

    root: Path
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> Path:
        """The path of one file."""
        return self.root / self.files[index]

    def name(self, index: int) -> str:
        """The path of one file."""
        return str(self.root / self.files[index])

    def state(self, index: int) -> str:
        """Size and time of the last change."""
        facts = (self.root / self.files[index]).stat()
        return f"{facts.st_size} {facts.st_mtime_ns}"

    def fingerprint(self) -> str:
        """Hash of the relative paths (not of the contents, which would mean reading everything)."""
        return sha256("\n".join(self.files).encode()).hexdigest()


def index_videos(reader: VideoReader, folder: str | Path) -> list[VideoInfo | str]:
    """Facts about every video, or the reason why there are none.

    Looked up in ``folder`` for videos that have not changed; the others are probed, with a progress bar, by one process
    of this machine at a time.

    Args:
        reader: the videos.
        folder: where what was found is remembered, one file per set.

    Raises:
        UserError: if the folder cannot be written.
    """
    folder = writable_folder(Path(folder).expanduser(), "data.index_folder")
    name = sha256(f"{reader.name(0)}\n{reader.fingerprint()}".encode()).hexdigest()[:24]
    path = folder / f"{name}.json"
    with locked(folder / f"{name}.lock"):
        known = _read(path)
        found: dict[str, list] = {}
        todo = []
        for index in range(len(reader)):
            try:
                state = reader.state(index)
            except OSError:
                state = "missing"
            entry = known.get(reader.name(index))
            if entry is not None and entry[0] == state and state != "missing":
                found[reader.name(index)] = entry
            else:
                todo.append((index, state))
        if todo:
            found |= _probe_all(reader, todo)
            _write(path, found)
    return [_fact(found[reader.name(index)][1]) for index in range(len(reader))]


def _probe_all(reader: VideoReader, todo: list[tuple[int, str]]) -> dict[str, list]:
    def look(item: tuple[int, str]) -> tuple[str, list]:
        index, state = item
        name = reader.name(index)
        try:
            return name, [state, astuple(probe(reader.open(index), name))]
        except OSError as error:
            return name, [state, f"{name} ({error.strerror or error})"]
        except BrokenVideoError as error:
            return name, [state, str(error)]

    with ThreadPoolExecutor() as pool:
        results: Iterable[tuple[str, list]] = track(
            pool.map(look, todo), "looking at videos", total=len(todo), unit="video"
        )
        return dict(results)


def _fact(entry: list | tuple | str) -> VideoInfo | str:
    return entry if isinstance(entry, str) else VideoInfo(*entry)


def _read(path: Path) -> dict[str, list]:
    """What is remembered; nothing if the file is missing, damaged or of another format, as it can be made again."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content["videos"] if isinstance(content, dict) and content.get("format") == FORMAT else {}


def _write(path: Path, videos: dict[str, list]) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"format": FORMAT, "videos": videos}))
    partial.replace(path)
