import io
import json
import random
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from vgen.data.loader import build_loader
from vgen.data.source import check_labels, stratified_split
from vgen.data.transforms import ImageTransform, to_pixels
from vgen.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def build(name, **overrides):
    """Build a source from its YAML, in struct mode like the scripts."""
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    defaults = config.pop("defaults", [])
    if defaults:
        config = OmegaConf.merge(OmegaConf.load(CONFIGS / f"{defaults[0]}.yaml"), config)
    OmegaConf.set_struct(config, True)
    try:
        return instantiate(OmegaConf.merge(config, overrides))
    except InstantiationException as error:
        raise (error.__cause__ or error) from None


def noise(seed, size=(20, 16), form="PNG"):
    generator = random.Random(seed)
    image = Image.frombytes("RGB", size, generator.randbytes(size[0] * size[1] * 3))
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def decoded(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def write_parquet(path, images, labels, *, row_group_size=4, names=None, image_column="image", label_column="label"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [image if isinstance(image, dict) else {"bytes": image, "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image_column: pa.array(rows, kind), label_column: pa.array(labels)})
    if names:
        feature = {"info": {"features": {label_column: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
    pq.write_table(table, path, row_group_size=row_group_size)


def square(count, size=8):
    return [noise(i, (size, size)) for i in range(count)]


def test_stratified_split():
    labels = torch.arange(1000) % 7 % 4
    train, val = stratified_split(labels, 0.1, 3)
    assert len(val) == 100
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(1000))
    share = torch.bincount(labels[val]) / torch.bincount(labels)
    assert (share - 0.1).abs().max() < 0.01
    assert torch.equal(stratified_split(labels, 0.1, 3)[1], val)
    assert not torch.equal(stratified_split(labels, 0.1, 4)[1], val)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 0.001])
def test_bad_val_fraction(fraction):
    with pytest.raises(UserError, match="val_fraction"):
        stratified_split(torch.zeros(20, dtype=torch.int64), fraction, 0)


def test_check_labels():
    check_labels(torch.tensor([0, 9]), 10, where="x")
    for labels in ([0, 10], [-1]):
        with pytest.raises(UserError, match=r"x: label .* outside 0\.\.9"):
            check_labels(torch.tensor(labels), 10, where="x")


def test_digits():
    source = build("digits")
    assert (len(source.train), len(source.val), source.num_classes, source.image_size) == (1500, 297, 10, 16)
    assert torch.bincount(source.val.labels).min() >= 29
    batch = next(iter(build_loader(source.train, batch_size=8, seed=0, shuffle=True, drop_last=True)))
    assert batch["pixels"].shape == (8, 3, 16, 16)
    assert torch.equal(batch["pixels"][:, 0], batch["pixels"][:, 2])
    names = {source.train.name(i) for i in range(1500)} | {source.val.name(i) for i in range(297)}
    assert len(names) == 1797
    assert not torch.equal(
        source.train.__getitems__([(0, i) for i in range(9)])["pixels"].std(0).sum(), torch.zeros(())
    )
    still = build("digits", shift=0)
    assert torch.equal(still.train.__getitems__([(3, 77)])["pixels"][0], still.train[3]["pixels"])
    assert build("digits", image_size=32).train[0]["pixels"].shape == (3, 32, 32)
    with pytest.raises(UserError, match=r"data\.shift"):
        build("digits", shift=16)


def test_parquet_round_trip(tmp_path):
    images = square(11)
    write_parquet(tmp_path / "train-00000-of-00002.parquet", images[:6], [0, 1, 2, 0, 1, 2], names=["a", "b", "c"])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", images[6:9], [2, 1, 0])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", images[9:], [1, 1])
    memory, lazy = (build("parquet", path=str(tmp_path), in_memory=value) for value in (True, False))
    for source in (memory, lazy):
        assert (source.num_classes, source.class_names, source.image_size) == (3, ("a", "b", "c"), 8)
        assert source.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 2, 1, 0]
        assert source.val.labels.tolist() == [1, 1]
        for i in range(9):
            assert torch.equal(source.train[i]["pixels"], to_pixels(decoded(images[i])))
        assert torch.equal(source.val[1]["pixels"], to_pixels(decoded(images[10])))
        assert source.train.name(7).endswith("train-00001-of-00002.parquet row 1")
        assert source.train.name(5).endswith("train-00000-of-00002.parquet row 5")


def test_parquet_options(tmp_path):
    write_parquet(tmp_path / "data" / "all.parquet", [noise(i) for i in range(20)], [0, 1] * 10, image_column="img")
    source = build("parquet", path=str(tmp_path), image_column="img", image_size=8, crop="adm_random", val_fraction=0.2)
    assert (len(source.train), len(source.val), source.num_classes) == (16, 4, 2)
    seen = source.train.__getitems__([(0, draw) for draw in range(20)])["pixels"]
    assert len({picture.numpy().tobytes() for picture in seen}) > 3
    assert torch.equal(source.val.__getitems__([(0, 1)])["pixels"][0], source.val[0]["pixels"])
    with pytest.raises(UserError, match="in_memory=false"):
        build("parquet", path=str(tmp_path), image_column="img", image_size=8, crop="random", in_memory=True)


def test_parquet_val_split_and_paths(tmp_path):
    (tmp_path / "a.png").write_bytes(noise(5, (8, 8)))
    write_parquet(tmp_path / "train-0.parquet", [{"bytes": None, "path": "a.png"}, *square(3)], [0, 0, 0, 0])
    write_parquet(tmp_path / "test-0.parquet", square(2), [0, 0])
    write_parquet(tmp_path / "validation-0.parquet", square(3), [0, 0, 0])
    assert len(build("parquet", path=str(tmp_path)).val) == 3
    source = build("parquet", path=str(tmp_path), val_split="test")
    assert len(source.val) == 2
    assert torch.equal(source.train[0]["pixels"], to_pixels(decoded(noise(5, (8, 8)))))
    with pytest.raises(UserError, match="val_split=other"):
        build("parquet", path=str(tmp_path), val_split="other")


def test_parquet_errors(tmp_path):
    def failing(match, **options):
        with pytest.raises(UserError, match=match):
            build("parquet", path=str(tmp_path), **options)

    with pytest.raises(UserError, match="does not exist"):
        build("parquet", path=str(tmp_path / "nowhere"))
    failing(r"no \*\.parquet")
    file = tmp_path / "train-0.parquet"
    file.write_bytes(b"PAR1 nonsense")
    failing("train-0.parquet is not a readable parquet file")
    write_parquet(file, square(4), [0, 1, 2, 3])
    failing("no column photo, only image, label; set data.image_column", image_column="photo")
    failing("no column class, only image, label; set data.label_column", label_column="class")
    failing("column label is int64, not encoded images", image_column="label")
    failing(r"label 3 of image 3 is outside 0\.\.2", num_classes=3)
    failing("data.num_classes=4 but there are 2 class names", num_classes=4, class_names=["a", "b"])
    failing("data.val_fraction=0.05 leaves 4 of 4")
    write_parquet(file, square(4), [0, None, 2, 3])
    failing("1 empty labels")
    write_parquet(file, square(4), ["a", "b", "c", "d"])
    failing("does not hold integers")
    write_parquet(file, [noise(0), *square(3)], [0, 0, 0, 0])
    failing("20x16 pixels are not square; set data.image_size")
    write_parquet(file, [*square(3), noise(0, (9, 9))], [0, 0, 0, 0])
    failing("9x9 pixels but 8x8 is expected", val_fraction=0.3)
    file.rename(tmp_path / "test-0.parquet")
    failing("no train-")


def make_folder(root, classes=("cat", "dog"), count=5, size=(20, 16)):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(noise(100 * number + i, size))


def test_folder_imagenet_layout(tmp_path):
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "val", count=2)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    for name, size in (("folder", 8), ("imagenet256", 256)):
        source = build(name, path=str(tmp_path), in_memory=False, image_size=size)
        assert (len(source.train), len(source.val), source.class_names) == (10, 4, ("cat", "dog"))
        assert source.train.labels.tolist() == [0] * 5 + [1] * 5
        expected = ImageTransform(image_size=size, crop="adm_center", flip=False)(decoded(noise(102)))
        assert torch.equal(source.train[7]["pixels"], to_pixels(expected))


def test_folder_other_layouts(tmp_path):
    make_folder(tmp_path / "classes", count=10)
    source = build("folder", path=str(tmp_path / "classes"), image_size=8, val_fraction=0.2, class_names=["A", "B"])
    assert (len(source.train), len(source.val), source.class_names) == (16, 4, ("A", "B"))
    flat = build("folder", path=str(tmp_path / "classes" / "cat"), image_size=8, val_fraction=0.2)
    assert (len(flat.train), len(flat.val), flat.num_classes) == (8, 2, 1)


def test_memory_and_disk_serve_the_same(tmp_path):
    make_folder(tmp_path)
    memory, lazy = (
        build("folder", path=str(tmp_path), image_size=8, val_fraction=0.2, flip=False, in_memory=value)
        for value in (True, False)
    )
    draws = [(i, 7 * i) for i in range(8)]
    one, two = memory.train.__getitems__(draws), lazy.train.__getitems__(draws)
    assert torch.equal(one["pixels"], two["pixels"])
    assert [memory.train.name(i) for i in range(8)] == [lazy.train.name(i) for i in range(8)]


@pytest.mark.parametrize("crop", ["random", "adm_random"])
def test_random_crops_do_not_depend_on_workers_or_batch_size(tmp_path, crop):
    make_folder(tmp_path)
    source = build("folder", path=str(tmp_path), image_size=8, crop=crop, val_fraction=0.2)

    def pixels(**options):
        loader = build_loader(source.train, seed=0, shuffle=True, drop_last=False, **options)
        return torch.cat([batch["pixels"] for _ in range(2) for batch in loader])

    reference = pixels(batch_size=8)
    assert torch.equal(reference, pixels(batch_size=3, num_workers=2))
    assert not torch.equal(reference[:8].sort(0)[0], reference[8:].sort(0)[0])


def test_folder_errors(tmp_path):
    def failing(match):
        with pytest.raises(UserError, match=match):
            build("folder", path=str(tmp_path), image_size=8)

    with pytest.raises(UserError, match=r"data\.path=.* does not exist"):
        build("folder", path=str(tmp_path / "nowhere"), image_size=8)
    failing("holds no image")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    failing("holds no image")
    make_folder(tmp_path / "train", count=1)
    (tmp_path / "train" / "cow").mkdir()
    failing("train/cow holds no image; add images or remove the folder")
    (tmp_path / "train" / "cow").rmdir()
    make_folder(tmp_path / "val", classes=("cat", "fox"), count=1)
    failing("val/fox has no counterpart")
    (tmp_path / "train" / "stray.png").write_bytes(noise(1))
    failing("holds both folders .* and images")


def break_images(root):
    (root / "cat" / "1.png").write_bytes(b"")
    whole = (root / "dog" / "4.png").read_bytes()
    (root / "dog" / "4.png").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_replaced_and_named(tmp_path, workers):
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "val", count=1)
    break_images(tmp_path / "train")
    source = build("folder", path=str(tmp_path), image_size=8, in_memory=False)
    loader = build_loader(source.train, batch_size=5, seed=0, shuffle=False, drop_last=True, num_workers=workers)
    batches = list(loader)
    assert [len(batch["pixels"]) for batch in batches] == [5, 5]
    assert all("broken" not in batch for batch in batches)
    # The next readable image stands in, with its own label; after the last one comes the first.
    assert torch.cat([batch["index"] for batch in batches]).tolist() == [0, 2, 2, 3, 4, 5, 6, 7, 8, 0]
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [0] * 5 + [1] * 4 + [0]
    assert len(loader.broken) == 2
    summary = loader.broken.summary()
    assert summary.startswith("2 broken images were skipped")
    assert "cat/1.png (empty)" in summary
    assert "dog/4.png" in summary


def test_broken_images_are_left_out_of_memory(tmp_path):
    make_folder(tmp_path)
    break_images(tmp_path)
    source = build("folder", path=str(tmp_path), image_size=8, in_memory=True, val_fraction=0.5)
    broken = [*source.train.broken, *source.val.broken]
    assert len(source.train) + len(source.val) == 8
    assert sorted("cat/1.png" in name for name in broken) == [False, True]
    loader = build_loader(source.train, batch_size=1, seed=0, shuffle=False, drop_last=True)
    assert loader.broken.names == list(source.train.broken)


def test_broken_parquet_rows(tmp_path):
    images = square(6)
    write_parquet(tmp_path / "train-0.parquet", [images[0], None, b"junk", *images[3:]], [0] * 6)
    write_parquet(tmp_path / "test-0.parquet", images[:1], [0])
    lazy = build("parquet", path=str(tmp_path), in_memory=False).train.__getitems__([(1, 0), (2, 1), (5, 2)])
    assert lazy["index"].tolist() == [3, 3, 5]
    assert [name.split(" (")[0].rsplit("/")[-1] for name in dict.fromkeys(lazy["broken"])] == [
        "train-0.parquet row 1",
        "train-0.parquet row 2",
    ]
    assert len(build("parquet", path=str(tmp_path), in_memory=True).train) == 4


def test_no_readable_image(tmp_path):
    make_folder(tmp_path, classes=("cat",), count=4)
    for path in (tmp_path / "cat").iterdir():
        path.write_bytes(b"junk")
    for in_memory in (True, False):
        with pytest.raises(UserError, match="none of the 2 images can be read"):
            build("folder", path=str(tmp_path), image_size=8, in_memory=in_memory, val_fraction=0.5).train[0]
    with pytest.raises(UserError, match="none of the 4 images can be read"):
        build("folder", path=str(tmp_path), image_size=None, crop="none")


def write_idx(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.numpy().tobytes())


@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_files(tmp_path, name, kind):
    raw = tmp_path / kind / "raw"
    pictures = torch.arange(5 * 28 * 28).view(5, 28, 28).to(torch.uint8)
    for prefix in ("train", "t10k"):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", pictures)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", torch.tensor([3, 1, 4, 1, 5], dtype=torch.uint8))
    source = build(name, root=str(tmp_path), download=False, image_size=None)
    assert (len(source.train), source.num_classes, source.image_size) == (5, 10, 28)
    assert torch.equal(source.train.pictures[:, 0], pictures)
    assert source.val.labels.tolist() == [3, 1, 4, 1, 5]
    assert source.train.flip == (name == "fashion_mnist")
    assert build(name, root=str(tmp_path), download=False).val[0]["pixels"].shape == (3, 32, 32)


def test_cifar10_arrays(monkeypatch):
    from torchvision import datasets

    class Fake:
        classes = [str(i) for i in range(10)]

        def __init__(self, root, train, download):
            self.data = torch.arange(2 * 32 * 32 * 3).view(2, 32, 32, 3).to(torch.uint8).numpy()
            self.targets = [7, int(train)]

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    source = build("cifar10", root="unused")
    assert source.train.labels.tolist() == [7, 1]
    assert source.val.labels.tolist() == [7, 0]
    assert source.val.pictures[0, :, 0, 1].tolist() == [3, 4, 5]
    assert (source.train.flip, source.val.flip) == (True, False)


@pytest.mark.parametrize("name", ["cifar10", "mnist", "fashion_mnist"])
def test_missing_downloads(tmp_path, name, monkeypatch):
    with pytest.raises(UserError, match=r"data\.root=.*does not hold .*set data\.download=true"):
        build(name, root=str(tmp_path), download=False)

    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(UserError, match=r"could not be downloaded to data\.root=.*; put .* by hand"):
        build(name, root=str(tmp_path))
