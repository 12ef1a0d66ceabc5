"""Whole jobs on the Inception network: names of the literature only with the published weights, sFID, both dialects."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.evaluation.helpers import compose_config, save_npz
from vgen.checkpoints.release import file_sha256
from vgen.errors import UserError
from vgen.evaluation import extractors, features
from vgen.evaluation.inception import Inception
from vgen.evaluation.job import evaluate
from vgen.evaluation.weights import INCEPTION


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights under the published name."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / INCEPTION.names[0]
    torch.save(Inception(None).state_dict(), path)
    return path


@pytest.fixture
def files(tmp_path, weights):
    save_npz(tmp_path / "samples.npz", 6, seed=1)
    save_npz(tmp_path / "real.npz", 6, seed=2)
    return tmp_path


def run(files, weights, *overrides):
    fixed = (
        f"samples={files}/samples.npz",
        f"reference={files}/real.npz",
        "device=cpu",
        f"evaluation.weights={weights}",
    )
    return evaluate(compose_config(*fixed, *overrides))


def accept(weights, monkeypatch):
    """Let the random weights pass for the published ones."""
    for module in (features, extractors):
        monkeypatch.setattr(module, "INCEPTION", replace(INCEPTION, sha256=file_sha256(weights)[:8]))


def test_a_protocol_of_the_adm_suite(files, weights, monkeypatch, capsys):
    accept(weights, monkeypatch)
    report = run(files, weights, "evaluation=imagenet256_adm_50k", "num_samples=6", "evaluation.batch_size=6")
    assert set(report["metrics"]) == {"fid", "sfid", "is", "precision", "recall"}
    assert report["estimator"]["dialect"] == "adm"
    assert report["why_not"] == [
        "6 samples, imagenet256_adm_50k uses 50000",
        "samples of 12x12, imagenet256_adm_50k uses 256x256",
    ]
    printed = capsys.readouterr()
    assert f"{weights} (SHA-256 {file_sha256(weights)[:8]}, checked)" in printed.err
    assert "dialect: adm; resize: tf1_bilinear" in printed.out
    assert "protocol: imagenet256_adm_50k" in printed.out
    statistics = np.load(next((files / "cache" / "statistics").glob("*.npz")))
    assert statistics["mu_s"].shape == (2023,)


def test_other_weights_are_refused_or_carry_their_hash(files, weights):
    with pytest.raises(UserError, match="expected SHA-256 starts with 6726825d"):
        run(files, weights, "metrics=[fid]")
    name = f"inception-unverified-{file_sha256(weights)[:8]}"
    report = run(files, weights, "metrics=[fid,sfid]", "evaluation.allow_unverified=true", "evaluation.batch_size=6")
    assert set(report["metrics"]) == {f"fd_{name}", f"sfd_{name}"}
    assert report["comparable_with_published"] is False
    assert f"the extractor is {name}" in report["why_not"]
