import io
import json
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.evaluation.helpers import quadrant_pictures, save_npz
from vgen.data.arrays import ArrayImages
from vgen.errors import UserError
from vgen.evaluation.pictures import RangeGuard, Subset, read_picture
from vgen.evaluation.readers import DatasetPictures, open_pictures


def save_folder(folder, pictures, *, labels=None):
    for i, picture in enumerate(pictures):
        place = folder if labels is None else folder / str(labels[i])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{i:03d}.png")
    return folder


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_gives_back_pictures_and_labels(tmp_path, save):
    pictures, labels = quadrant_pictures(6, seed=0)
    save(tmp_path / "a.npz", pictures, labels)
    opened = open_pictures(tmp_path / "a.npz", key="samples")
    assert len(opened) == 6
    assert opened.labels.tolist() == labels.tolist()
    assert torch.equal(opened.read([4, 1]), torch.from_numpy(pictures[[4, 1]]).permute(0, 3, 1, 2))


def test_folder_is_sorted_and_class_folders_are_labels(tmp_path):
    pictures, labels = quadrant_pictures(6, seed=0)
    flat = open_pictures(save_folder(tmp_path / "flat", pictures), key="samples")
    assert flat.labels is None
    assert torch.equal(flat.read(range(6)), torch.from_numpy(pictures).permute(0, 3, 1, 2))
    classes = open_pictures(save_folder(tmp_path / "classes", pictures, labels=labels), key="samples")
    assert classes.labels.tolist() == sorted(labels.tolist())
    named = save_folder(tmp_path / "named", pictures[:2], labels=["dog", "cat"])
    assert open_pictures(named, key="samples", class_names=["dog", "cat"]).labels.tolist() == [1, 0]


def test_a_grey_and_a_palette_picture_become_rgb(tmp_path):
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.png")
    for name in ("grey.png", "palette.png"):
        assert torch.equal(read_picture(tmp_path / name), torch.from_numpy(grey).expand(3, 4, 4))
    opaque = Image.fromarray(np.full((4, 4, 4), 255, np.uint8))
    opaque.save(tmp_path / "opaque.png")
    assert read_picture(tmp_path / "opaque.png").shape == (3, 4, 4)


def write_bad_file(kind, path):
    if kind == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "transparent":
        Image.fromarray(np.full((4, 4, 4), 100, np.uint8)).save(path)
    else:
        Image.fromarray(np.zeros((4, 4), np.uint16)).save(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "cannot be read"),
        ("empty", "cannot be read"),
        ("transparent", "transparent pixels"),
        ("sixteen_bit", "pixel mode I;16"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, kind, message):
    write_bad_file(kind, tmp_path / "bad.png")
    with pytest.raises(UserError, match=rf"bad\.png.*{message}"):
        open_pictures(tmp_path, key="samples").read([0])


def test_unequal_sizes_are_refused_by_name(tmp_path):
    save_folder(tmp_path, [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)])
    with pytest.raises(UserError, match=r"001\.png is 6x4 but .* 4x4"):
        open_pictures(tmp_path, key="samples").read([0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "float32; pictures must be uint8"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, "expected .pictures, height, width, 3"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "is empty"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "no array arr_0 .it holds: images"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, np.int64)}, "arr_1 is int64 .3."),
    ],
)
def test_a_bad_npz_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_pictures(tmp_path / "bad.npz", key="samples")


def test_a_truncated_npz_is_refused(tmp_path):
    path = save_npz(tmp_path / "a.npz", 6, seed=0)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UserError, match=r"a\.npz cannot be read"):
        open_pictures(path, key="samples")


def test_a_missing_path_an_empty_folder_and_another_file(tmp_path):
    with pytest.raises(UserError, match=r"reference=.*nowhere does not exist"):
        open_pictures(tmp_path / "nowhere", key="reference")
    with pytest.raises(UserError, match="holds no picture"):
        open_pictures(tmp_path, key="samples")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="neither a folder nor"):
        open_pictures(tmp_path / "a.txt", key="samples")


@pytest.mark.parametrize("png", [False, True])
def test_the_folder_of_sample_py(tmp_path, png):
    pictures, labels = quadrant_pictures(5, seed=0)
    save_folder(tmp_path, pictures[:1])  # the overview grid beside the samples is not a sample
    if png:
        save_folder(tmp_path / "images", pictures)
    else:
        np.savez(tmp_path / "samples.npz", pictures, labels)
    document = {"identity": {"checkpoint_sha256": "ab"}, "labels": labels.tolist()}
    (tmp_path / "samples.json").write_text(json.dumps(document))
    opened = open_pictures(tmp_path, key="samples")
    assert len(opened) == 5
    assert opened.labels.tolist() == labels.tolist()
    assert opened.origin == {"identity": {"checkpoint_sha256": "ab"}}
    (tmp_path / "samples.json").write_text(json.dumps(document | {"labels": [1]}))
    with pytest.raises(UserError, match="lists 1 labels"):
        open_pictures(tmp_path, key="samples")


def test_unfinished_samples_are_refused(tmp_path):
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "identity.json").write_text("{}")
    with pytest.raises(UserError, match="unfinished samples"):
        open_pictures(tmp_path, key="samples")


def test_a_data_set_is_read_without_augmentation():
    stored = torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8)
    images = ArrayImages(pictures=stored, labels=torch.arange(5), flip=True, shift=2)
    opened = DatasetPictures(images, "toy")
    assert torch.equal(opened.read([3, 0]), stored[[3, 0]].expand(-1, 3, -1, -1))
    part = Subset(opened, [4, 2], "part")
    assert part.labels.tolist() == [4, 2]
    assert torch.equal(part.read([1]), opened.read([2]))


def test_an_npz_with_stored_members_is_mapped_not_loaded(tmp_path):
    path = save_npz(tmp_path / "a.npz", 6, seed=0)
    assert zipfile.ZipFile(path).getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED
    assert isinstance(open_pictures(path, key="samples").array, np.memmap)


def encoded(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, pictures, labels=None, *, extra=()):
    members = [(f"{i:03d}.png", encoded(picture)) for i, picture in enumerate(pictures)]
    if labels is not None:
        members += [(f"{i:03d}.cls", str(label).encode()) for i, label in enumerate(labels)]
    with tarfile.open(path, "w") as archive:
        for name, data in [*members, *extra]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_tar_shards_of_webdataset(tmp_path):
    pictures, labels = quadrant_pictures(7, seed=0)
    write_tar(tmp_path / "a-0.tar", pictures[:4], labels[:4], extra=[("000.json", b"{}")])
    write_tar(tmp_path / "a-1.tar", pictures[4:], labels[4:])
    for where in (tmp_path, tmp_path / "a-*.tar"):
        opened = open_pictures(where, key="samples")
        assert opened.kind == "tar"
        assert opened.labels.tolist() == labels.tolist()
        assert torch.equal(opened.read([6, 0, 3]), torch.from_numpy(pictures[[6, 0, 3]]).permute(0, 3, 1, 2))


def test_bad_tar_shards_are_refused_by_name(tmp_path):
    pictures, _ = quadrant_pictures(3, seed=0)
    whole = write_tar(tmp_path / "whole.tar", pictures)
    content = whole.read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: 512 + 100])
    with pytest.raises(UserError, match=r"cut\.tar cannot be read as an uncompressed tar"):
        open_pictures(tmp_path / "cut.tar", key="samples")
    write_tar(tmp_path / "none.tar", [], extra=[("a.txt", b"x")])
    with pytest.raises(UserError, match=r"none\.tar holds no picture"):
        open_pictures(tmp_path / "none.tar", key="samples")
    write_tar(tmp_path / "empty.tar", [], extra=[("a.png", b"")])
    with pytest.raises(UserError, match=r"empty\.tar:a\.png .*is empty"):
        open_pictures(tmp_path / "empty.tar", key="samples").read([0])
    write_tar(tmp_path / "label.tar", pictures[:1], ["cat"])
    with pytest.raises(UserError, match=r"label\.tar: a \.cls member is not a class number"):
        open_pictures(tmp_path / "label.tar", key="samples")


@pytest.mark.parametrize("column", ["image", "img"])
def test_parquet_of_the_hub(tmp_path, column):
    pictures, labels = quadrant_pictures(5, seed=0)
    rows = [{"bytes": encoded(picture), "path": None} for picture in pictures]
    for name, part in (("0.parquet", slice(0, 3)), ("1.parquet", slice(3, 5))):
        table = pa.table({column: rows[part], "label": labels[part]})
        pq.write_table(table, tmp_path / name, row_group_size=2)
    opened = open_pictures(tmp_path, key="reference")
    assert opened.labels.tolist() == labels.tolist()
    assert torch.equal(opened.read([4, 2]), torch.from_numpy(pictures[[4, 2]]).permute(0, 3, 1, 2))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "2.parquet")
    with pytest.raises(UserError, match=r"2\.parquet has no image column .* only text"):
        open_pictures(tmp_path, key="reference")


def test_npz_shards_are_joined_and_must_agree(tmp_path):
    save_npz(tmp_path / "0.npz", 3, seed=0)
    save_npz(tmp_path / "1.npz", 2, seed=1)
    opened = open_pictures(tmp_path, key="samples")
    assert len(opened) == 5
    assert opened.labels.tolist() == [0, 1, 2, 0, 1]
    expected = open_pictures(tmp_path / "1.npz", key="samples").read([1])
    assert torch.equal(opened.read([4]), expected)
    save_npz(tmp_path / "2.npz", 2, seed=1, size=16)
    with pytest.raises(UserError, match=r"2\.npz holds items of shape \[3, 16, 16\], those before it \[3, 12, 12\]"):
        open_pictures(tmp_path, key="samples").read([0, 5])


def test_a_folder_of_two_kinds_is_refused(tmp_path):
    save_npz(tmp_path / "0.npz", 3, seed=0)
    save_folder(tmp_path, np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"mixes kinds of files: 1 npz \(0.npz.*1 image \(000.png"):
        open_pictures(tmp_path, key="samples")


def test_fingerprints_tell_content_and_not_storage(tmp_path):
    pictures, _ = quadrant_pictures(5, seed=0)
    np.savez(tmp_path / "a.npz", pictures)
    np.savez_compressed(tmp_path / "b.npz", pictures)
    np.savez(tmp_path / "c.npz", pictures[::-1])
    a, b, c = (open_pictures(tmp_path / f"{name}.npz", key="samples") for name in "abc")
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()
    assert Subset(a, [0, 1], "x").fingerprint() != Subset(a, [1, 0], "x").fingerprint()
    folder = open_pictures(save_folder(tmp_path / "folder", pictures), key="samples")
    before = folder.fingerprint()
    Image.fromarray(pictures[0]).save(tmp_path / "folder" / "003.png")
    assert folder.fingerprint() != before


def test_pictures_stored_without_scaling_are_noticed():
    good, _ = quadrant_pictures(30, seed=0)
    guard = RangeGuard()
    guard.update(torch.from_numpy(good))
    assert RangeGuard.check(guard.seen, guard.binary, "x") is None
    guard.update(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))
    assert RangeGuard.check(guard.seen, guard.binary, "x") is None
    guard.update(torch.ones(1, 4, 4, 3, dtype=torch.uint8))
    assert "1 of 33 pictures of x hold only the values 0 and 1" in RangeGuard.check(guard.seen, guard.binary, "x")
    with pytest.raises(UserError, match="mixed with others"):
        RangeGuard.check(20, 7, "x")


def test_an_animated_picture_is_refused(tmp_path):
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (0, 90)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=r"a\.webp is animated"):
        open_pictures(tmp_path, key="samples").read([0])
