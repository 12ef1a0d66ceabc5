import json
import shutil

import numpy as np
import pytest
import torch

from tests.evaluation.helpers import GOLDEN
from vgen.errors import UserError
from vgen.evaluation.frechet import Gaussian, frechet_distance, gaussian_of
from vgen.evaluation.statistics import (
    SetStatistics,
    StatisticsCache,
    content_hash,
    has_statistics,
    load_statistics,
    save_statistics,
)

META = {"extractor": "tiny", "resize_mode": "tf1_bilinear", "extractor_sha256": "ab"}


def features(count, dim=6, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("count", [4, 30], ids=["few", "many"])
def test_a_stored_set_gives_the_same_distance(tmp_path, count):
    fit, other = gaussian_of(features(count), ddof=0), gaussian_of(features(20, seed=1), ddof=0)
    path = save_statistics(tmp_path / "new" / "set.npz", SetStatistics(fit, gaussian_of(features(count, 3)), META))
    loaded = load_statistics(path, expected={**META, "ddof": 0})
    assert frechet_distance(loaded.pool, other) == frechet_distance(fit, other)
    assert loaded.pool.count == count
    assert loaded.pool.ddof == 0
    assert loaded.spatial.dim == 3
    assert loaded.meta == {**META, "ddof": 0}
    assert has_statistics(path)
    assert [p.name for p in path.parent.iterdir()] == ["set.npz"]


def test_files_of_other_tools(tmp_path):
    published = load_statistics(GOLDEN / "adm_reference_example.npz", expected=META)
    assert published.pool.dim == 6
    assert published.pool.mean.dtype == torch.float64
    assert published.spatial.dim == 4
    assert published.pool.count == 0
    assert not has_statistics(GOLDEN / "adm_samples_example.npz")
    fit = gaussian_of(features(9))
    np.savez(tmp_path / "plain.npz", mu=fit.mean.numpy(), sigma=fit.covariance.numpy())
    assert load_statistics(tmp_path / "plain.npz").spatial is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "holds no statistics mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"expected \[d\] and \[d, d\]"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "NaN or infinite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "meta_json": np.array("{")}, "cannot be read"),
        (
            {"mu": np.zeros(3), "sigma": np.eye(3), "meta_json": np.array(json.dumps({"extractor": "other"}))},
            "extractor is other there and tiny here",
        ),
        ({"mu": np.array([None]), "sigma": np.eye(1)}, "cannot be read"),
    ],
)
def test_files_that_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_statistics(tmp_path / "bad.npz", expected=META)


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(UserError, match="do not exist"):
        load_statistics(tmp_path / "none.npz")
    data = (GOLDEN / "adm_reference_example.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        load_statistics(tmp_path / "cut.npz")
    assert not has_statistics(tmp_path / "cut.npz")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_statistics(tmp_path / "file" / "set.npz", SetStatistics(gaussian_of(features(4))))


def test_the_cache_knows_content_and_conventions_only(tmp_path):
    cache = StatisticsCache(tmp_path / "cache")
    content = content_hash([features(5)])
    statistics = SetStatistics(gaussian_of(features(5)), None, META)
    assert cache.get(content, META) is None
    path = cache.put(content, statistics)
    assert torch.equal(cache.get(content, META).pool.covariance, statistics.pool.covariance)
    assert cache.get(content, {**META, "resize_mode": "clean"}) is None
    assert cache.get(content_hash([features(5, seed=1)]), META) is None
    path.write_bytes(path.read_bytes()[:50])
    assert cache.get(content, META) is None


def test_the_content_hash_sees_bytes_and_order_not_places(tmp_path):
    for name, text in (("a.png", "one"), ("b.png", "two"), ("c.png", "one")):
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    assert content_hash([a, b]) == content_hash([c, b])
    assert content_hash([a, b]) != content_hash([b, a])
    assert content_hash(["x", a]) != content_hash(["y", a])
    shutil.copy(a, tmp_path / "moved")
    assert content_hash([tmp_path / "moved"]) == content_hash([a])
    whole = torch.arange(12, dtype=torch.uint8)
    assert content_hash([whole]) == content_hash([whole.numpy()])
    assert content_hash([whole]) != content_hash([whole.view(3, 4)])
    assert content_hash([whole]) != content_hash([whole.int()])
    assert content_hash([whole[::2]]) == content_hash([whole[::2].contiguous()])
    with pytest.raises(UserError, match="cannot be read"):
        content_hash([tmp_path / "none.png"])


def test_statistics_of_other_widths_or_values_have_no_distance():
    fit = gaussian_of(features(5))
    with pytest.raises(UserError, match="statistics of 6 and 4 features"):
        frechet_distance(fit, gaussian_of(features(5, 4)))
    broken = Gaussian(5, torch.full((6,), torch.nan), fit.covariance)
    with pytest.raises(UserError, match="NaN"):
        frechet_distance(fit, broken)
