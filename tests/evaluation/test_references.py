"""The real side of a comparison: stored statistics, reference batches, and the cache of computed ones."""

import json

import numpy as np
import pytest
import torch

from tests.evaluation.helpers import TinyExtractor, compose_config, quadrant_pictures, save_npz, save_script
from vgen.errors import UserError
from vgen.evaluation import real_side
from vgen.evaluation.features import load_extractor
from vgen.evaluation.frechet import gaussian_of
from vgen.evaluation.job import evaluate
from vgen.evaluation.statistics import SetStatistics, save_statistics


@pytest.fixture
def files(tmp_path):
    torch.set_num_threads(1)
    save_npz(tmp_path / "samples.npz", 33, seed=1)
    save_npz(tmp_path / "real.npz", 60, seed=2, contrast=70)
    save_script(TinyExtractor(), tmp_path / "tiny.pt")
    return tmp_path


def run(files, *overrides, reference="real.npz", metrics="[fd]"):
    fixed = (f"samples={files}/samples.npz", f"reference={files}/{reference}", "device=cpu", f"metrics={metrics}")
    return evaluate(compose_config(*fixed, f"evaluation.features={files}/tiny.pt", *overrides))


def fit_of(files):
    extractor = load_extractor(str(files / "tiny.pt"), name=None, weights=None, device=torch.device("cpu"))
    real = torch.from_numpy(quadrant_pictures(60, seed=2, contrast=70)[0]).permute(0, 3, 1, 2)
    return extractor, gaussian_of(extractor(real)[0])


def test_statistics_are_found_again_by_the_content_of_the_reference(files, monkeypatch):
    first = run(files)
    assert first["dataset"]["statistics"] == "computed"
    np.savez_compressed(files / "copy.npz", quadrant_pictures(60, seed=2, contrast=70)[0])
    again = run(files, reference="copy.npz")
    assert again["dataset"]["statistics"] == "cached"
    assert again["metrics"] == pytest.approx(first["metrics"], rel=1e-12)
    assert run(files, "num_reference=59")["dataset"]["statistics"] == "computed"
    assert run(files, "evaluation.features_name=other")["dataset"]["statistics"] == "computed"
    assert run(files, "evaluation.cache=null")["dataset"]["statistics"] == "computed"
    pictures = np.array(quadrant_pictures(60, seed=2, contrast=70)[0])
    pictures[7, 3, 3, 1] ^= 1
    np.savez(files / "real.npz", pictures)
    assert run(files)["dataset"]["statistics"] == "computed"
    # With everything cached the reference is not run through the extractor again.
    monkeypatch.setattr(real_side, "collect", None)
    assert run(files)["dataset"]["statistics"] == "cached"


def test_a_full_cache_disk_costs_no_score(files):
    (files / "file").write_text("in the way")
    report = run(files, f"evaluation.cache={files}/file/cache")
    assert "fd_tiny" in report["metrics"]
    assert any("file/cache" in warning for warning in report["warnings"])


def test_stored_statistics_replace_the_pictures(files):
    extractor, fit = fit_of(files)
    save_statistics(files / "ours.npz", SetStatistics(fit, meta={**extractor.conventions(), "ddof": 1}))
    np.savez(files / "plain.npz", mu=fit.mean.numpy(), sigma=fit.covariance.numpy())
    expected = run(files)["metrics"]["fd_tiny"]
    for name, count in (("ours", 60), ("plain", None)):
        report = run(files, reference=f"{name}.npz")
        assert report["metrics"]["fd_tiny"] == pytest.approx(expected, rel=1e-9)
        assert report["n_reference"] == count
        assert report["dataset"]["statistics"] == "stored"
        assert len(report["dataset"]["reference_sha256"]) == 64
    assert any("does not say how its statistics were made" in warning for warning in report["warnings"])
    with pytest.raises(UserError, match="holds statistics only, but kid need pictures"):
        run(files, reference="plain.npz", metrics="[fd,kid]")
    with pytest.raises(UserError, match="made with other conventions: extractor is tiny there and other here"):
        run(files, "evaluation.features_name=other", reference="ours.npz")


def test_statistics_of_a_set_are_written_and_read(files):
    tiny = f"evaluation.features={files}/tiny.pt"
    fixed = ("job=statistics", f"samples={files}/real.npz", "device=cpu", "metrics=[fd]")
    assert evaluate(compose_config(*fixed, tiny, f"out={files}/stats.npz")) == {}
    report = run(files, reference="stats.npz")
    assert report["metrics"]["fd_tiny"] == pytest.approx(run(files)["metrics"]["fd_tiny"], rel=1e-12)
    assert report["n_reference"] == 60
    assert report["dataset"]["statistics"] == "stored"
    for overrides, message in (((tiny, "out=a.json"), "must end in .npz"), (("metrics=[psnr]",), "needs an extractor")):
        with pytest.raises(UserError, match=message):
            evaluate(compose_config(*fixed, f"out={files}/x.npz", *overrides))


def test_a_reference_batch_gives_statistics_and_pictures(files):
    _, fit = fit_of(files)
    pictures = quadrant_pictures(20, seed=5)[0]  # other pictures than the statistics were made of
    np.savez(files / "batch.npz", pictures, mu=fit.mean.numpy(), sigma=fit.covariance.numpy())
    np.savez(files / "pictures.npz", pictures)
    batch = run(files, reference="batch.npz", metrics="[fd,prc]")
    assert batch["metrics"]["fd_tiny"] == pytest.approx(run(files)["metrics"]["fd_tiny"], rel=1e-9)
    alone = run(files, reference="pictures.npz", metrics="[prc]")
    assert batch["metrics"]["recall_tiny"] == alone["metrics"]["recall_tiny"]
    wide = gaussian_of(torch.randn(40, 5))
    np.savez(files / "wide.npz", mu=wide.mean.numpy(), sigma=wide.covariance.numpy())
    with pytest.raises(UserError, match="made with 5 features, tiny has 12"):
        run(files, reference="wide.npz")


def test_the_two_dialects_are_named_and_differ(files):
    options = ("evaluation.isc_splits=2", "evaluation.isc_split_size=11", "evaluation.prdc_neighborhood=3")
    theirs = run(files, *options, "evaluation.dialect=adm", metrics="[isc,prc,prdc]")
    ours = run(files, *options, metrics="[isc,prc,prdc,mind]")
    assert ours["metrics"]["mind_tiny"] > 0
    assert theirs["estimator"]["dialect"] == "adm"
    assert ours["estimator"]["dialect"] == "torch-fidelity"
    assert "is_tiny_std" in ours["metrics"]
    assert "is_tiny_std" not in theirs["metrics"]
    assert theirs["metrics"]["is_tiny"] != pytest.approx(ours["metrics"]["is_tiny"], rel=1e-6)
    assert {"density_tiny", "coverage_tiny", "precision_tiny", "recall_tiny"} <= set(ours["metrics"])
    pictures, labels = quadrant_pictures(44, seed=1)
    order = np.argsort(labels, kind="stable")
    np.savez(files / "samples.npz", pictures[order], labels[order])
    sorted_report = run(files, *options, "evaluation.dialect=adm", metrics="[isc]")
    assert any("sorted by class" in warning for warning in sorted_report["warnings"])


def test_a_protocol_states_what_was_done_differently(files):
    protocol = (
        "+evaluation.protocol={_target_: vgen.evaluation.protocol.Protocol, name: toy, source: none, num_samples: 20, "
        "image_size: 16, labels: null, reference: real pictures, num_reference: 61}"
    ).removeprefix("+")
    report = run(files, protocol)
    assert report["n_samples"] == 20
    assert report["protocol"]["name"] == "toy"
    assert report["why_not"] == [
        "the extractor is tiny",
        "samples of 12x12, toy uses 16x16",
        "60 reference items, toy uses 61",
    ]
    assert "21 samples, toy uses 20" in run(files, protocol, "num_samples=21")["why_not"]
    assert json.loads((files / "samples.report.json").read_text())["comparable_with_published"] is False
