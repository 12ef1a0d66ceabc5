import json

import numpy as np
import pytest
import torch

from tests.checkpoints.helpers import tiny_release
from vgen.checkpoints.release import load_pipeline
from vgen.errors import UserError
from vgen.pixels import to_uint8
from vgen.processes import Processes
from vgen.sampling import store as store_module
from vgen.sampling.job import run_sampling
from vgen.sampling.overlap import InTurn
from vgen.sampling.pipeline import Pipeline, make_labels
from vgen.sampling.settings import Sampling
from vgen.sampling.store import SampleStore, grid_order


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load_pipeline(tiny_release(tmp_path_factory.mktemp("release")), device=torch.device("cpu"))


def run(pipeline, out, **changes):
    options = {"num_samples": 11, "labels": "balanced", "batch_size": 4, "fmt": "npz", "grid_pictures": 9} | changes
    return run_sampling(
        pipeline, Sampling(), peers=Processes(), identity={"checkpoint_sha256": "x"}, out=str(out), **options
    )


def test_writes_the_archive_of_the_adm_suite_and_a_grid(pipeline, tmp_path):
    files = {path.name for path in run(pipeline, tmp_path / "a", fmt="both")}
    assert files == {"grid.png", "samples.npz", "samples.json", "images"}
    archive = np.load(tmp_path / "a" / "samples.npz")
    assert archive["arr_0"].shape == (11, 8, 8, 3)
    assert archive["arr_0"].dtype == np.uint8
    labels = make_labels("balanced", 11, 3, seed=0)
    assert np.array_equal(archive["arr_1"], labels.numpy())
    expected = pipeline.generate(labels, torch.arange(11), Sampling()).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(archive["arr_0"], expected)
    assert len(list((tmp_path / "a" / "images").glob("*.png"))) == 11
    assert json.loads((tmp_path / "a" / "samples.json").read_text())["images_per_s"] > 0


def test_pictures_are_resized_before_they_are_rounded(pipeline):
    labels, index = torch.tensor([0, 1]), torch.tensor([0, 1])
    small = Pipeline(generator=pipeline.generator, tokenizer=pipeline.tokenizer, plan=pipeline.plan, picture_size=5)
    pixels = pipeline.tokenizer.decode(pipeline.generate_ids(labels, index, Sampling()))
    expected = torch.nn.functional.interpolate(pixels, size=(5, 5), mode="bicubic", antialias=False)
    assert torch.equal(small.generate(labels, index, Sampling()), to_uint8(expected))
    with pytest.raises(UserError, match="picture_size"):
        Pipeline(generator=pipeline.generator, tokenizer=pipeline.tokenizer, plan=pipeline.plan, picture_size=0)


def test_batch_size_changes_nothing(pipeline, tmp_path):
    run(pipeline, tmp_path / "a", batch_size=1)
    run(pipeline, tmp_path / "b", batch_size=11)
    one, two = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in "ab")
    assert np.array_equal(one, two)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_killed_run_goes_on_without_repeating_finished_samples(pipeline, tmp_path, monkeypatch, ahead):
    monkeypatch.setattr(InTurn, "ahead", ahead)
    whole = tmp_path / "whole"
    run(pipeline, whole)
    write, written = SampleStore.write, []

    def dying(self, batch):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(batch.index)
        write(self, batch)

    monkeypatch.setattr(SampleStore, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, tmp_path / "cut")
    later = []

    def counting(self, batch):
        later.append(batch.index)
        write(self, batch)

    monkeypatch.setattr(SampleStore, "write", counting)
    run(pipeline, tmp_path / "cut")
    assert not set(torch.cat(later).tolist()) & set(torch.cat(written).tolist())
    one, two = (np.load(folder / "samples.npz")["arr_0"] for folder in (whole, tmp_path / "cut"))
    assert np.array_equal(one, two)


def test_a_finished_folder_is_not_sampled_again(pipeline, tmp_path, monkeypatch):
    run(pipeline, tmp_path / "a")
    monkeypatch.setattr(SampleStore, "write", lambda *_: pytest.fail("sampled again"))
    run(pipeline, tmp_path / "a")


def test_samples_of_another_run_are_never_mixed(pipeline, tmp_path):
    run(pipeline, tmp_path / "a")
    with pytest.raises(UserError, match=r"another run \(different num_samples"):
        run(pipeline, tmp_path / "a", num_samples=12)


def test_full_disk_is_noticed_before_sampling(pipeline, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "posix_fallocate", full)
    monkeypatch.setattr(type(pipeline), "generate_ids", lambda *_: pytest.fail("sampled before the disk was checked"))
    with pytest.raises(UserError, match="No space left"):
        run(pipeline, tmp_path / "a")


def test_unwritable_folder_is_noticed_before_sampling(pipeline, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out=.*cannot be written"):
        run(pipeline, tmp_path / "file" / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"fmt": "gif"}, "format=gif"),
        ({"labels": "some"}, "labels=some"),
        ({"labels": "0,7"}, r"classes are 0\.\.2"),
    ],
)
def test_bad_arguments_are_named(pipeline, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(pipeline, tmp_path / "a", **change)


def test_labels_are_balanced_random_or_given():
    balanced = make_labels("balanced", 30, 3, seed=0)
    assert torch.bincount(balanced).tolist() == [10, 10, 10]
    assert not torch.equal(balanced, balanced.sort().values)
    random = make_labels("random", 3000, 3, seed=0)
    assert torch.bincount(random).min() > 900
    assert torch.bincount(random).tolist() != [1000, 1000, 1000]
    assert torch.equal(random[:100], make_labels("random", 100, 3, seed=0))
    assert make_labels("2,0", 5, 3, seed=0).tolist() == [2, 0, 2, 0, 2]


def test_out_of_range_label_stops_before_work(pipeline):
    with pytest.raises(UserError, match="class label 4 is out of range"):
        pipeline.generate_ids(torch.tensor([0, 4]), torch.tensor([0, 1]), Sampling())


def test_grid_has_one_column_per_class():
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    index, columns = grid_order(labels, 3, 100)
    assert columns == 3
    assert labels[index].tolist() == [0, 1, 2, 0, 1, 2]
    assert grid_order(torch.zeros(9, dtype=torch.int64), 3, 4)[0].tolist() == [0, 1, 2, 3]


class SmallMemory:
    """A pipeline whose batches fit up to a size."""

    def __init__(self, pipeline, largest):
        self.pipeline, self.largest, self.sizes, self.freed = pipeline, largest, [], 0

    def __getattr__(self, name):
        return getattr(self.pipeline, name)

    def generate_ids(self, labels, index, sampling):
        self.sizes.append(len(labels))
        if len(labels) > self.largest:
            raise torch.OutOfMemoryError("out of memory")
        return self.pipeline.generate_ids(labels, index, sampling)

    def free_memory(self):
        self.freed += 1


def test_batches_that_do_not_fit_are_refused_with_a_size_that_does(pipeline, tmp_path):
    with pytest.raises(UserError, match=r"batch_size=11 does not fit in memory, batch_size=3 does"):
        run(SmallMemory(pipeline, 3), tmp_path / "a", batch_size=11)
    with pytest.raises(UserError, match="a single sample"):
        run(SmallMemory(pipeline, 0), tmp_path / "b")


def test_batches_that_do_not_fit_are_split_when_asked(pipeline, tmp_path):
    run(pipeline, tmp_path / "whole")
    small = SmallMemory(pipeline, 3)
    run(small, tmp_path / "split", batch_size=11, split_batches=True)
    assert small.sizes == [11, 6, 3, 3, 3, 2]
    assert small.freed == 2
    one, two = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("whole", "split"))
    assert np.array_equal(one, two)


def test_other_failures_are_not_taken_for_a_lack_of_memory(pipeline, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(pipeline, "generate_ids", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(pipeline, tmp_path / "a")
