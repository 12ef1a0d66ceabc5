import json
import multiprocessing

import numpy as np
import pytest
import torch
from torch import nn

from tests.data.test_sources import break_images, build, make_folder
from vgen.data.arrays import ArrayImages
from vgen.data.codes import Manifest, code_dtype, codes, tokenizer_fingerprint
from vgen.data.extract import cache_codes, extract_codes
from vgen.data.loader import build_loader
from vgen.data.source import DataSource
from vgen.data.transforms import adm_center_crop, ten_crop, to_pixels
from vgen.errors import UserError
from vgen.tokenizers.base import Tokenizer, TokenizerOutput

CPU = torch.device("cpu")


class Blocks(Tokenizer):
    """Ids from the mean of each 4x4 block; simple enough to predict, and trainable in name only."""

    def __init__(self, image_size=8, codebook_size=512):
        side = image_size // 4
        super().__init__(image_size=image_size, grid=(side, side), codebook_size=codebook_size)
        self.gain = nn.Parameter(torch.ones(1))
        self.calls = 0
        self.fail_at = -1

    @property
    def codebook(self):
        return torch.linspace(-1, 1, self.codebook_size)[:, None]

    @property
    def last_layer(self):
        return self.gain

    def encode(self, pixels):
        assert not self.training
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        means = nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 4).flatten(1) * self.gain
        return ((means + 1) / 2 * (self.codebook_size - 1)).round().long().clamp(0, self.codebook_size - 1)

    def decode(self, ids):
        return self.codebook[ids].view(-1, 1, *self.grid).expand(-1, 3, -1, -1)

    def forward(self, pixels):
        ids = self.encode(pixels)
        return TokenizerOutput(reconstruction=self.decode(ids), ids=ids, losses={})

    def compile_parts(self):
        raise AssertionError("extraction never trains")


def images(count=13, size=8):
    pictures = torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return ArrayImages(pictures=pictures, labels=torch.arange(count) % 3, flip=True)


def extract(folder, dataset=None, tokenizer=None, **options):
    dataset, tokenizer = dataset or images(), tokenizer or Blocks()
    defaults = {
        "tokenizer_hash": tokenizer_fingerprint(tokenizer),
        "augmentation": "none",
        "split": "train",
        "source": "noise",
        "num_classes": 3,
        "class_names": ("a", "b", "c"),
        "batch_size": 4,
        "device": CPU,
    }
    return extract_codes(dataset, tokenizer, folder, **(defaults | options))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored(folder):
    return torch.from_numpy(np.load(folder / "codes.npy").astype(np.int64))


@torch.no_grad()
def encoded(pixels):
    return Blocks().eval().encode(pixels)


def test_none_and_flip_hold_the_right_ids(tmp_path):
    plain = torch.stack([images()[i]["pixels"] for i in range(13)])
    assert extract(tmp_path / "none").num_variants == 1
    assert torch.equal(stored(tmp_path / "none")[:, 0], encoded(plain))
    extract(tmp_path / "flip", augmentation="flip")
    both = stored(tmp_path / "flip")
    assert torch.equal(both[:, 0], encoded(plain))
    assert torch.equal(both[:, 1], encoded(plain.flip(-1)))
    assert np.load(tmp_path / "flip" / "labels.npy").tolist() == images().labels.tolist()


@pytest.mark.parametrize("ratios", [(1.1,), (1.1, 1.5)])
def test_ten_crop_chain_of_llamagen(tmp_path, ratios):
    make_folder(tmp_path / "data")
    source = build("folder", path=str(tmp_path / "data"), image_size=20, val_fraction=0.2, in_memory=False)
    tokenizer = Blocks(image_size=20)
    manifest = extract(tmp_path / "codes", source.train, tokenizer, augmentation="ten_crop", crop_ratios=ratios)
    assert manifest.num_variants == 10 * len(ratios)
    raw = source.train.raw(3)
    crops = [crop for ratio in ratios for crop in ten_crop(adm_center_crop(raw, int(20 * ratio)), 20)]
    expected = encoded(torch.stack([to_pixels(crop) for crop in crops]))
    assert torch.equal(stored(tmp_path / "codes")[3], expected)
    assert not torch.equal(expected[0], expected[3])


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_interrupted_extraction_continues_bit_for_bit(tmp_path, stop):
    whole = Blocks()
    extract(tmp_path / "whole", tokenizer=whole, augmentation="flip")
    assert whole.calls == 7
    broken_off = Blocks()
    broken_off.fail_at = stop
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path / "parts", tokenizer=broken_off, augmentation="flip")
    with pytest.raises(UserError, match="incomplete; run the same encoding again"):
        codes(path=str(tmp_path / "parts"), val_fraction=0.2, seed=0)
    resumed = Blocks()
    extract(tmp_path / "parts", tokenizer=resumed, augmentation="flip")
    assert resumed.calls == 7 - (stop - 1)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    idle = Blocks()
    assert extract(tmp_path / "parts", tokenizer=idle, augmentation="flip").complete
    assert idle.calls == 0


def _killed(folder):
    tokenizer = Blocks()

    def encode(pixels, original=tokenizer.encode):
        if tokenizer.calls == 2:
            multiprocessing.current_process().kill()
        return original(pixels)

    tokenizer.encode = encode
    extract(folder, tokenizer=tokenizer)


def test_killed_extraction_continues(tmp_path, monkeypatch):
    monkeypatch.setattr("vgen.data.extract.FLUSH_SECONDS", 0.0)
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path / "killed",))
    torch.set_num_threads(1)
    process.start()
    process.join(60)
    assert process.exitcode != 0
    labels = np.load(tmp_path / "killed" / "labels.npy")
    assert (labels >= 0).sum() == 8
    resumed = Blocks()
    extract(tmp_path / "killed", tokenizer=resumed)
    assert resumed.calls == 2
    extract(tmp_path / "whole")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def _share(folder, rank):
    extract(folder, rank=rank, world_size=2, patience=60.0)


def test_processes_share_the_rows(tmp_path):
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_share, args=(tmp_path / "shared", rank)) for rank in (1, 0)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    extract(tmp_path / "single")
    assert files(tmp_path / "shared") == files(tmp_path / "single")


def test_a_lost_process_is_reported_and_can_be_made_up_for(tmp_path):
    with pytest.raises(UserError, match="5 images were left by another process; start the encoding again"):
        extract(tmp_path, rank=0, world_size=2, patience=0.1)
    with pytest.raises(UserError, match="the first process created no cache"):
        extract(tmp_path / "other", rank=1, world_size=2, patience=0.1)
    tokenizer = Blocks()
    assert extract(tmp_path, tokenizer=tokenizer).complete
    assert tokenizer.calls == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_dropped(tmp_path, workers):
    make_folder(tmp_path / "data" / "train")
    make_folder(tmp_path / "data" / "val", count=1)
    break_images(tmp_path / "data" / "train")
    for in_memory in (True, False):
        source = build("folder", path=str(tmp_path / "data"), image_size=8, in_memory=in_memory)
        cache = cache_codes(
            source,
            Blocks(),
            tmp_path / f"codes{in_memory}",
            augmentation="flip",
            batch_size=4,
            device=CPU,
            seed=0,
            num_workers=workers,
        )
        assert len(cache.train) == 8
        assert len(cache.val) == 2
        assert cache.train.labels.tolist() == [0] * 4 + [1] * 4
        assert [name.split(" (")[0].rsplit("/")[-1] for name in cache.train.broken] == ["1.png", "4.png"]
        loader = build_loader(cache.train, batch_size=8, seed=0, shuffle=False, drop_last=True)
        assert len(loader.broken) == 2
        plain = torch.stack([source.val[i]["pixels"] for i in range(2)])
        assert torch.equal(cache.val.__getitems__([(0, 5), (1, 6)])["ids"], encoded(plain))
        assert torch.equal(cache.train[1]["ids"], encoded(source.train[1 if in_memory else 2]["pixels"][None])[0])


def test_code_batches(tmp_path):
    extract(tmp_path, augmentation="flip")
    source = codes(path=str(tmp_path), val_fraction=0.24, seed=0)
    assert (source.grid, source.codebook_size, source.num_classes, source.image_size) == ((2, 2), 512, 3, 8)
    assert (len(source.train), len(source.val)) == (10, 3)
    loader = build_loader(source.train, batch_size=5, seed=0, shuffle=True, drop_last=True)
    batch = next(iter(loader))
    assert set(batch) == {"ids", "label", "index"}
    assert batch["ids"].dtype == torch.int64
    assert batch["ids"].shape == (5, 4)
    assert torch.equal(batch["label"], source.train.labels[batch["index"]])
    both = stored(tmp_path)[source.train.rows]
    drawn = source.train.__getitems__([(4, draw) for draw in range(300)])["ids"]
    second = (drawn == both[4, 1]).all(1)
    assert torch.equal(~second, (drawn == both[4, 0]).all(1))
    assert 100 < second.sum() < 200
    assert torch.equal(source.train.__getitems__([(4, 299), (4, 0)])["ids"], drawn[[299, 0]])
    plain = source.train.without_augmentation().__getitems__([(4, draw) for draw in range(20)])["ids"]
    assert (plain == both[4, 0]).all()
    assert torch.equal(source.train[4]["ids"], both[4, 0])


def test_yaml(tmp_path):
    pictures = images(40)
    extract(tmp_path, pictures)
    source = build("codes", path=str(tmp_path), val_fraction=0.1)
    assert (len(source.train), len(source.val), source.class_names) == (36, 4, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"augmentation": "flip"}, "augmentation none vs flip"),
        ({"tokenizer_hash": "f" * 64}, "tokenizer_hash"),
        ({"dataset": images(12)}, "num_images 13 vs 12"),
        ({"split": "val"}, "split train vs val"),
        ({"tokenizer": Blocks(codebook_size=70000)}, "codebook_size 512 vs 70000"),
    ],
)
def test_manifest_mismatch(tmp_path, options, key):
    extract(tmp_path)
    before = files(tmp_path)
    with pytest.raises(UserError, match=f"holds other codes .*{key}.*delete it or choose another folder"):
        extract(tmp_path, **options)
    assert files(tmp_path) == before


def test_changed_pictures_are_noticed(tmp_path):
    extract(tmp_path)
    changed = images()
    changed.pictures[7, 0, 0, 0] ^= 1
    with pytest.raises(UserError, match="source_hash"):
        extract(tmp_path, changed)


def test_bad_options(tmp_path):
    for options, message in (
        ({"augmentation": "five"}, "augmentation=five"),
        ({"tokenizer": Blocks(image_size=16)}, "data.image_size=8"),
        ({"augmentation": "ten_crop", "crop_ratios": (0.9,)}, "crop_ratios"),
    ):
        with pytest.raises(UserError, match=message):
            extract(tmp_path / "codes", **options)
    assert not (tmp_path / "codes").exists()


def test_another_tokenizer_is_refused(tmp_path):
    extract(tmp_path)
    right = tokenizer_fingerprint(Blocks())
    assert codes(path=str(tmp_path), val_fraction=0.2, seed=0, tokenizer_hash=right).tokenizer_hash == right
    with pytest.raises(UserError, match="made by another tokenizer"):
        codes(path=str(tmp_path), val_fraction=0.2, seed=0, tokenizer_hash="0" * 64)


def test_damaged_caches(tmp_path):
    def failing(match):
        with pytest.raises(UserError, match=match):
            codes(path=str(tmp_path), val_fraction=0.2, seed=0)

    failing("no cached codes")
    extract(tmp_path)
    whole = files(tmp_path)
    (tmp_path / "codes.npy").write_bytes(whole["codes.npy"][:-8])
    failing("is damaged")
    (tmp_path / "codes.npy").write_bytes(whole["codes.npy"])
    np.save(tmp_path / "labels.npy", np.full(13, 3))
    failing(r"label 3 of image 0 is outside 0\.\.2")
    np.save(tmp_path / "labels.npy", np.zeros(12, dtype=np.int64))
    failing("does not fit manifest.json")
    np.save(tmp_path / "labels.npy", np.full(13, -1))
    failing("none of the 13 images")
    (tmp_path / "manifest.json").write_text("{")
    failing("manifest.json cannot be read")
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 0}))
    failing("not a manifest of format 1")
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "colour": 2}))
    failing("missing or unknown entries")


def test_splits_of_different_tokenizers(tmp_path):
    extract(tmp_path / "train")
    extract(tmp_path / "val", tokenizer_hash="0" * 64)
    with pytest.raises(UserError, match="train and val differ in tokenizer_hash"):
        codes(path=str(tmp_path), val_fraction=0.2, seed=0)


def test_large_codebooks_use_four_bytes(tmp_path):
    assert [code_dtype(size) for size in (16384, 65536, 65537)] == ["uint16", "uint16", "uint32"]
    tokenizer = Blocks(codebook_size=200000)
    extract(tmp_path, tokenizer=tokenizer)
    assert np.load(tmp_path / "codes.npy").dtype == np.uint32
    plain = torch.stack([images()[i]["pixels"] for i in range(13)])
    expected = tokenizer.eval().encode(plain)
    assert expected.max() > 65535
    source = codes(path=str(tmp_path), val_fraction=0.2, seed=0)
    assert torch.equal(source.train[5]["ids"], expected[source.train.rows[5]])


def test_fingerprint():
    first, second = Blocks(), Blocks()
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    with torch.no_grad():
        second.gain += 1e-7
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(second)
    one, two = nn.Module(), nn.Module()
    weights = [torch.ones(2), torch.zeros((), dtype=torch.bfloat16)]
    for module, order in ((one, "ab"), (two, "ba")):
        for name in order:
            module.register_buffer(name, weights["ab".index(name)])
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(two)


def test_manifest_round_trip(tmp_path):
    manifest = extract(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert (manifest.done, manifest.num_tokens, manifest.broken) == (13, 4, ())


def test_cache_codes_of_a_source(tmp_path):
    source = DataSource("noise", images(30), images(6).without_augmentation(), 3, ("a", "b", "c"), 8)
    options = {"augmentation": "ten_crop", "batch_size": 8, "device": CPU, "seed": 0}
    tokenizer = Blocks().train()
    cache = cache_codes(source, tokenizer, tmp_path, **options)
    assert tokenizer.training
    assert (len(cache.train), len(cache.val), cache.train.codes.shape[1], cache.val.codes.shape[1]) == (30, 6, 10, 1)
    calls = tokenizer.calls
    cache_codes(source, tokenizer, tmp_path, **options)
    assert tokenizer.calls == calls
