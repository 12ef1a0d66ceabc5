"""Opening whatever holds the pictures or clips to score: folders, archives, data sets."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vgen.data.source import ImageDataset
from vgen.errors import UserError
from vgen.evaluation.array_reader import ArrayPictures
from vgen.evaluation.parquet_reader import ParquetPictures
from vgen.evaluation.pictures import EncodedPictures, Joined, Pictures, labels_of_folders, read_bytes
from vgen.evaluation.tar_reader import TarPictures
from vgen.evaluation.video_files import VIDEO_EXTENSIONS, ClipChoice, VideoClips
from vgen.pixels import to_uint8

SAMPLES_JSON = "samples.json"  # written by sample.py beside its pictures
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
KINDS = "a folder of images or videos, .npz, .tar (webdataset) or .parquet"


class FolderPictures(EncodedPictures):
    """Image files of a folder, sorted by path.

    Labels come from sub-folders named by the class number or by a name in ``class_names``.
    """

    kind = "folder"

    def __init__(self, folder: Path, files: Sequence[Path], class_names: Sequence[str] = ()):
        super().__init__()
        self.name = str(folder)
        self.files = list(files)
        self.labels = labels_of_folders((file.relative_to(folder).as_posix() for file in files), class_names)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.files)

    def encoded(self, index: int) -> bytes:
        """The content of a file."""
        return read_bytes(self.files[index])

    def item_name(self, index: int) -> str:
        """Path of a file."""
        return str(self.files[index])


class DatasetPictures(Pictures):
    """The pictures or clips of a data set, in its order and without augmentation."""

    kind = "dataset"

    def __init__(self, dataset: ImageDataset, name: str):
        self.name = name
        self.dataset = dataset.without_augmentation()
        self.labels = self.dataset.labels
        self.frames = getattr(dataset, "num_frames", None)
        if len(self.dataset) == 0:
            raise UserError(f"{name} is empty")

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.dataset)

    def read(self, index: Sequence[int]) -> Tensor:
        """Pictures uint8 [B, 3, H, W], or clips [B, T, 3, H, W], of the given indices.

        Raises:
            UserError: naming a picture that cannot be read: a stand-in for it would be scored twice.
        """
        batch = self.dataset.__getitems__([(i, 0) for i in index])
        if batch.get("broken"):
            raise UserError(f"{self.name}: {batch['broken'][0]} cannot be read; replace or remove it")
        items = to_uint8(batch["pixels"])
        return items if self.frames is None else items.transpose(1, 2)

    def fingerprint(self) -> str:
        """Hash of the data set's pictures (of their files, for sets on disk) and of their crop."""
        return hashlib.sha256(f"dataset {self.dataset.fingerprint()}".encode()).hexdigest()


def _open_samples(folder: Path) -> Pictures:
    """The samples that sample.py wrote to a folder, with the labels it asked for."""
    try:
        document = json.loads((folder / SAMPLES_JSON).read_text())
        labels = torch.tensor(document.pop("labels"), dtype=torch.int64)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / SAMPLES_JSON} is damaged; repeat the sample.py command in a new folder") from error
    archive = folder / "samples.npz"
    pictures = ArrayPictures(archive) if archive.is_file() else _open_folder(folder / "images", (), None)
    if len(labels) != len(pictures):
        raise UserError(f"{pictures.name} holds {len(pictures)} pictures but {SAMPLES_JSON} lists {len(labels)} labels")
    pictures.labels, pictures.origin = labels, document
    return pictures


def _open_folder(folder: Path, class_names: Sequence[str], clips: ClipChoice | None) -> Pictures:
    """A folder by what it holds; kinds must not be mixed, so that nothing is left out unnoticed."""
    files: dict[str, list[Path]] = {}
    for path in sorted((p for p in folder.rglob("*") if p.is_file()), key=str):
        suffix = path.suffix.lower()
        kind = "image" if suffix in IMAGE_EXTENSIONS else "video" if suffix in VIDEO_EXTENSIONS else suffix[1:]
        if kind in ("image", "video", "npz", "tar", "parquet"):
            files.setdefault(kind, []).append(path)
    if not files:
        raise UserError(
            f"{folder} holds no picture ({', '.join(IMAGE_EXTENSIONS)}), video ({', '.join(VIDEO_EXTENSIONS)}), .npz, "
            f".tar or .parquet file"
        )
    if len(files) > 1:
        shown = ", ".join(f"{len(paths)} {kind} ({paths[0].name}, ...)" for kind, paths in files.items())
        raise UserError(f"{folder} mixes kinds of files: {shown}; keep what is to be scored in a folder of its own")
    kind, paths = next(iter(files.items()))
    if kind == "image":
        return FolderPictures(folder, paths, class_names)
    if kind == "video":
        return VideoClips(folder, paths, _clip_choice(folder, clips), class_names)
    return _open_files(kind, paths, str(folder))


def _open_files(kind: str, paths: list[Path], name: str) -> Pictures:
    if kind == "npz":
        return ArrayPictures(paths[0]) if len(paths) == 1 else Joined([ArrayPictures(path) for path in paths], name)
    return TarPictures(paths, name) if kind == "tar" else ParquetPictures(paths, name)


def _clip_choice(where: Path, clips: ClipChoice | None) -> ClipChoice:
    if clips is None:
        raise UserError(
            f"{where} holds videos; say which frames to score with evaluation.clips, or choose a protocol "
            f"such as evaluation=ucf101_fvd_2048x16"
        )
    return clips


def open_pictures(
    path: str | Path, *, key: str, class_names: Sequence[str] = (), clips: ClipChoice | None = None
) -> Pictures:
    """Open a folder or file of pictures or clips, a folder that sample.py wrote, or shards named by a glob pattern.

    Args:
        path: folder, file, or pattern such as ``shards/train-*.tar``.
        key: configuration key the path came from, for messages.
        class_names: names that label sub-folders.
        clips: which frames of video files make a clip.

    Raises:
        UserError: if the path is missing, of another kind or holds no picture.
    """
    path = Path(path).expanduser()
    if any(mark in path.name for mark in "*?["):
        found = sorted(path.parent.glob(path.name))
        kinds = {p.suffix.lower()[1:] for p in found}
        if len(kinds) != 1 or not kinds <= {"npz", "tar", "parquet"}:
            what = f"matches files of several kinds ({', '.join(sorted(kinds))})" if found else "matches no file"
            raise UserError(f"{key}={path} {what}; a pattern must name .npz, .tar or .parquet shards")
        return _open_files(kinds.pop(), found, str(path))
    if (path / SAMPLES_JSON).is_file():
        return _open_samples(path)
    if (path / "partial" / "identity.json").is_file():
        raise UserError(f"{key}={path} holds unfinished samples; repeat the sample.py command that makes them")
    if path.is_dir():
        return _open_folder(path, class_names, clips)
    if not path.exists():
        raise UserError(f"{key}={path} does not exist; give {KINDS}")
    suffix = path.suffix.lower()
    if suffix in VIDEO_EXTENSIONS:
        return VideoClips(path.parent, [path], _clip_choice(path, clips), class_names)
    if suffix not in (".npz", ".tar", ".parquet"):
        raise UserError(f"{key}={path} is neither a folder nor one of .npz, .tar, .parquet")
    return _open_files(suffix[1:], [path], str(path))
