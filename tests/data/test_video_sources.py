import io
import json
import tarfile

import pytest
import torch

from tests.data.test_sources import build
from tests.data.video_helpers import grey, write_classes, write_video
from vgen.data.loader import build_loader
from vgen.data.video_clips import ClipOptions
from vgen.errors import UserError

SMALL = {"image_size": 16, "num_frames": 4}


def options(tmp_path, **changes):
    return {**SMALL, "index_folder": str(tmp_path / "index"), **changes}


def greys(pixels):
    """Grey values 0..255 of the frames of pixels [..., 3, T, S, S]."""
    return ((pixels.mean((-4, -2, -1)) + 1) * 127.5).tolist()


def test_folder_of_classes(tmp_path):
    write_classes(tmp_path / "v")
    source = build("video_folder", path=str(tmp_path / "v"), val_fraction=0.34, **options(tmp_path))
    assert (source.name, source.num_classes, source.class_names) == ("v", 2, ("cat", "dog"))
    assert (source.num_frames, source.image_size) == (4, 16)
    assert (len(source.train), len(source.val)) == (4, 2)
    item = source.val[1]
    assert item["pixels"].shape == (3, 4, 16, 16)
    # The central window: frames 4..7 of 12.
    assert greys(item["pixels"]) == pytest.approx([grey(int(item["label"]), i) for i in range(4, 8)], abs=6)
    batch = source.train.__getitems__([(0, 5), (3, 6)])
    assert batch["pixels"].shape == (2, 3, 4, 16, 16)
    assert batch["label"].tolist() == [0, 1]
    assert batch["broken"] == []
    assert source.val.picture(0).shape == (3, 4, 16, 16)
    assert source.val.raw(0).size == (48, 32)


def test_draws_depend_on_seed_and_counter_only(tmp_path):
    write_classes(tmp_path / "v", per_class=1, frames=40)
    source = build("video_folder", path=str(tmp_path / "v"), val_fraction=0.5, **options(tmp_path))
    draws = [(0, counter) for counter in range(6)]
    together = source.train.__getitems__(draws)["pixels"]
    alone = torch.cat([source.train.__getitems__([draw])["pixels"] for draw in draws])
    assert torch.equal(together, alone)
    starts = {round(values[0]) for values in greys(together)}
    assert len(starts) > 1
    other = build("video_folder", path=str(tmp_path / "v"), val_fraction=0.5, **options(tmp_path, seed=1))
    assert not torch.equal(other.train.__getitems__(draws)["pixels"], together)


def test_stride_windows_and_short_videos(tmp_path):
    common = {"image_size": 16, "num_frames": 4, "crop": "center", "flip": False, "train_clips": "all"}
    common |= {"val_clips": "uniform", "short_videos": "repeat", "index_folder": "x", "seed": 0}
    cut = ClipOptions(**common, stride=3, clips_per_video=3)
    assert cut.span == 10
    assert cut.starts("all", 32) == [0, 10, 20]
    assert cut.starts("uniform", 32) == [0, 11, 22]
    assert cut.starts("random", 32) == [11]
    assert cut.starts("uniform", 7) == [0, 0, 0]
    write_classes(tmp_path / "v" / "train", per_class=2, frames=3)
    write_classes(tmp_path / "v" / "val", per_class=1, frames=12)
    write_video(tmp_path / "v" / "train" / "cat" / "long.mp4", frames=12)
    path = {"path": str(tmp_path / "v")}
    repeated = build("video_folder", **path, **options(tmp_path, stride=1))
    assert len(repeated.train) == 5
    short = next(i for i in range(len(repeated.train)) if "long" not in repeated.train.name(i))
    values = greys(repeated.train[short]["pixels"])
    assert values[2] == pytest.approx(values[3], abs=1e-3)
    assert values[1] != pytest.approx(values[2], abs=3)
    dropped = build("video_folder", **path, **options(tmp_path, short_videos="drop", train_clips="all"))
    assert [len(dropped.train), len(dropped.train.broken)] == [3, 4]
    assert "(3 frames, a clip covers 4)" in dropped.train.broken[0]


def test_unreadable_videos_are_skipped_counted_and_named(tmp_path):
    write_classes(tmp_path / "v" / "train", per_class=2)
    write_classes(tmp_path / "v" / "val", per_class=1)
    bad = tmp_path / "v" / "train" / "cat" / "0.mp4"
    bad.write_bytes(b"nothing")
    source = build("video_folder", path=str(tmp_path / "v"), **options(tmp_path))
    assert len(source.train) == 3
    loader = build_loader(source.train, batch_size=3, seed=0, shuffle=True, drop_last=True)
    assert str(bad) in loader.broken.summary()
    # A file that breaks after it was looked at.
    gone = tmp_path / "v" / "train" / "dog" / "1.mp4"
    gone.unlink()
    batch = next(iter(loader))
    assert batch["pixels"].shape[0] == 3
    assert str(gone) in loader.broken.summary()


def test_index_is_remembered_and_follows_changes(tmp_path, monkeypatch):
    write_classes(tmp_path / "v", per_class=1)
    path = {"path": str(tmp_path / "v"), "val_fraction": 0.5}
    first = build("video_folder", **path, **options(tmp_path, train_clips="all", val_clips="all"))
    assert len(first.train) + len(first.val) == 6
    from vgen.data import video_index

    looked = []
    real = video_index.probe
    monkeypatch.setattr(video_index, "probe", lambda video, name: (looked.append(name), real(video, name))[1])
    build("video_folder", **path, **options(tmp_path))
    assert looked == []
    write_video(tmp_path / "v" / "cat" / "0.mp4", frames=24)
    longer = build("video_folder", **path, **options(tmp_path, train_clips="all", val_clips="all"))
    assert looked == [str(tmp_path / "v" / "cat" / "0.mp4")]
    assert len(longer.train) + len(longer.val) == 9
    (index,) = (tmp_path / "index").glob("*.json")
    index.write_text("{")
    assert len(build("video_folder", **path, **options(tmp_path)).train) == 1


@pytest.fixture
def ucf(tmp_path):
    root = tmp_path / "ucf"
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    rows = {"train": [], "test": []}
    for number, name in enumerate(("Archery", "Basketball")):
        (root / "UCF-101" / name).mkdir(parents=True)
        for group in (1, 2, 8, 9):
            file = f"{name}/v_{name}_g{group:02d}_c01.avi"
            write_video(root / "UCF-101" / file, video=number)
            rows["test" if group < 8 else "train"].append((file, number + 1))
    (lists / "trainlist01.txt").write_text("\n".join(f"{file} {number}" for file, number in rows["train"]))
    (lists / "testlist01.txt").write_text("\n".join(file for file, _ in rows["test"]) + "\n")
    return root


def test_ucf101(ucf, tmp_path):
    source = build("ucf101", path=str(ucf), **options(tmp_path))
    assert (source.name, source.class_names) == ("ucf101", ("Archery", "Basketball"))
    assert all("_g08_" in source.train.name(i) or "_g09_" in source.train.name(i) for i in range(4))
    assert len(source.train) == len(source.val) == 4
    assert source.val.labels.tolist() == [0, 0, 1, 1]
    assert len(build("ucf101", path=str(ucf), train_on="all", **options(tmp_path)).train) == 8
    (ucf / "UCF-101" / "Archery" / "v_Archery_g08_c01.avi").unlink()
    missing = build("ucf101", path=str(ucf), **options(tmp_path))
    assert len(missing.train) == 3
    assert "v_Archery_g08_c01.avi (No such file" in missing.train.broken[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": 4}, "data.split=4 must be 1, 2 or 3"),
        ({"split": 2}, "trainlist02.txt cannot be read"),
        ({"train_on": "test"}, "data.train_on=test must be train or all"),
        ({"lists": "/nowhere"}, "lists are not in /nowhere"),
        ({"train_clips": "some"}, "data.train_clips=some is unknown"),
        ({"stride": 0}, "data.stride=0 must be at least 1"),
        ({"crop": "adm_center"}, "data.crop=adm_center is unknown"),
        ({"short_videos": "loop"}, "data.short_videos=loop is unknown"),
    ],
)
def test_bad_options(ucf, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        build("ucf101", path=str(ucf), **options(tmp_path, **changes))


def test_lists_of_kinetics_and_larp(tmp_path):
    root = tmp_path / "k600"
    (root / "train" / "abseiling").mkdir(parents=True)
    (root / "juggling").mkdir()
    write_video(root / "train" / "abseiling" / "abc_000001_000011.mp4")
    write_video(root / "juggling" / "x-_z_000020_000030.mkv", video=1)
    head = "label,youtube_id,time_start,time_end,split\n"
    (root / "train.csv").write_text(
        head + "abseiling,abc,1,11,train\njuggling,x-_z,20,30,train\njuggling,dead,0,10,train\n"
    )
    (root / "validate.csv").write_text(head + "juggling,x-_z,20,30,val\n")
    source = build("kinetics600", path=str(root), **options(tmp_path))
    assert source.class_names == ("abseiling", "juggling")
    assert source.train.labels.tolist() == [0, 1]
    assert "dead_000000_000010.mp4 (No such file" in source.train.broken[0]
    (root / "larp.csv").write_text("id,path,action,label\n0,juggling/x-_z_000020_000030.mkv,juggling,7\n")
    source = build("kinetics600", path=str(root), train_list="larp.csv", val_list="larp.csv", **options(tmp_path))
    assert source.class_names == ("juggling",)
    (root / "odd.csv").write_text("video,class\na,b\n")
    with pytest.raises(UserError, match=r"odd\.csv has the columns class, video"):
        build("kinetics600", path=str(root), train_list="odd.csv", **options(tmp_path))


def write_shard(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_shards(tmp_path):
    videos = []
    for number in range(2):
        write_video(tmp_path / "a.mp4", video=number)
        videos.append((tmp_path / "a.mp4").read_bytes())
    for shard in range(2):
        samples = []
        for number, video in enumerate(videos):
            label = (".cls", str(number).encode()) if shard else (".json", json.dumps({"label": number}).encode())
            samples += [(f"clip{shard}{number}{label[0]}", label[1]), (f"clip{shard}{number}.mp4", video)]
        write_shard(tmp_path / "shards" / f"train-{shard:04d}.tar", samples)
    lengths = []
    for pattern in ("shards", "shards/train-*.tar", "shards/train-{0000..0001}.tar"):
        source = build("video_shards", path=str(tmp_path / pattern), val_fraction=0.5, **options(tmp_path))
        lengths.append((len(source.train), len(source.val)))
        label = int(source.val[0]["label"])
        assert greys(source.val[0]["pixels"]) == pytest.approx([grey(label, i) for i in range(4, 8)], abs=6)
    assert lengths == [(2, 2)] * 3
    loader = build_loader(source.train, batch_size=2, seed=0, shuffle=True, drop_last=True, num_workers=1)
    assert next(iter(loader))["pixels"].shape == (2, 3, 4, 16, 16)


def test_bad_shards(tmp_path):
    def attempt(pattern):
        return build("video_shards", path=str(tmp_path / pattern), **options(tmp_path))

    with pytest.raises(UserError, match="names no tar file"):
        attempt("none-*.tar")
    write_shard(tmp_path / "a-1.tar", [])
    with pytest.raises(UserError, match=r"a-2\.tar does not exist"):
        attempt("a-{1..2}.tar")
    with pytest.raises(UserError, match="hold no video"):
        attempt("a-1.tar")
    write_shard(tmp_path / "b.tar", [("x.mp4", b"1")])
    with pytest.raises(UserError, match=r"x\.mp4 has no label"):
        attempt("b.tar")
    write_shard(tmp_path / "c.tar", [("x.mp4", b"1"), ("x.cls", b"cat")])
    with pytest.raises(UserError, match="holds no class number"):
        attempt("c.tar")
    (tmp_path / "d.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match=r"d\.tar cannot be read"):
        attempt("d.tar")


def test_numbered_classes_and_unknown_ones(tmp_path):
    (tmp_path / "v").mkdir()
    for number in range(2):
        write_video(tmp_path / "v" / f"{number}.mp4", video=number)
    (tmp_path / "v" / "list.csv").write_text("path,label\n0.mp4,0\n1.mp4,3\n")
    lists = {"path": str(tmp_path / "v"), "train_list": "list.csv", "val_list": "list.csv"}
    source = build("kinetics600", **lists, **options(tmp_path))
    assert (source.num_classes, source.train.labels.tolist()) == (4, [0, 3])
    with pytest.raises(UserError, match=r"label 3 of image 1 is outside 0\.\.1"):
        build("kinetics600", **lists, class_names=["a", "b"], **options(tmp_path))
    (tmp_path / "v" / "list.csv").write_text("path,action\n0.mp4,run\n1.mp4,jump\n")
    with pytest.raises(UserError, match="name the class jump"):
        build("kinetics600", **lists, class_names=["run"], **options(tmp_path))
    (tmp_path / "v" / "list.csv").write_text("path,action\nnotes.txt,run\n")
    with pytest.raises(UserError, match=r"names notes\.txt, which is no video"):
        build("kinetics600", **lists, **options(tmp_path))
