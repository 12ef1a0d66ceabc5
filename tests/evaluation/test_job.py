import json
import os
import re

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import multiprocessing

from tests.evaluation.helpers import (
    FeaturesOnly,
    TinyExtractor,
    compose_config,
    quadrant_pictures,
    save_generator,
    save_npz,
    save_script,
    save_tokenizer,
)
from vgen.errors import UserError
from vgen.evaluation.features import load_extractor
from vgen.evaluation.frechet import frechet_distance, gaussian_of
from vgen.evaluation.job import evaluate
from vgen.evaluation.metrics import inception_score, kernel_distance
from vgen.evaluation.readers import open_pictures
from vgen.sampling.pipeline import Pipeline

EVERYTHING = "evaluation.metrics=[fd,isc,kid,prc,accuracy,classifier,nearest]"
SMALL = (
    "evaluation.batch_size=7",
    "evaluation.isc_splits=2",
    "evaluation.kid_subsets=3",
    "evaluation.kid_subset_size=15",
)


@pytest.fixture
def files(tmp_path):
    torch.set_num_threads(1)
    save_npz(tmp_path / "samples.npz", 33, seed=1)
    save_npz(tmp_path / "real.npz", 60, seed=2, contrast=70)
    save_script(TinyExtractor(), tmp_path / "tiny.pt")
    return tmp_path


def common(files, *overrides):
    return (f"samples={files}/samples.npz", f"reference={files}/real.npz", "device=cpu", *SMALL, *overrides)


def run(files, *overrides):
    return evaluate(compose_config(*common(files, *overrides)))


def test_every_score_of_an_extractor_carries_its_name_and_is_right(files):
    report = run(files, EVERYTHING, f"evaluation.features={files}/tiny.pt", "evaluation.features_name=toy")
    samples, real = (open_pictures(files / f"{n}.npz", key="samples") for n in ("samples", "real"))
    extractor = load_extractor(str(files / "tiny.pt"), name="toy", weights=None, device=torch.device("cpu"))
    (a, logits), (b, _) = extractor(samples.read(range(33))), extractor(real.read(range(60)))
    metrics = report["metrics"]
    assert metrics["fd_toy"] == pytest.approx(frechet_distance(gaussian_of(a), gaussian_of(b)), rel=1e-9)
    assert metrics["is_toy"] == pytest.approx(inception_score(logits, splits=2, seed=2020)[0], rel=1e-9)
    kid = kernel_distance(a, b, subsets=3, subset_size=15, seed=2020)
    assert (metrics["kid_toy"], metrics["kid_toy_std"]) == pytest.approx(kid, rel=1e-9)
    assert metrics["class_accuracy"] == pytest.approx((logits.argmax(1) == samples.labels).double().mean().item())
    assert {"precision_toy", "recall_toy", "classifier_accuracy", "nearest_ratio"} <= set(metrics)
    assert "fid" not in metrics


def test_the_report_is_complete_and_never_says_fid(files, capsys):
    run(files, "evaluation.metrics=[fd]", f"evaluation.features={files}/tiny.pt", "evaluation.seed=3")
    path = files / "samples.report.json"
    text = path.read_text()
    report = json.loads(text)
    words = text.replace(str(files), "").replace("_", " ").replace('"', " ").lower().split()
    assert not {"fid", "fid:", "rfid"} & set(words)
    assert not re.search(r"\br?fid\b", capsys.readouterr().out.replace(str(files), "").lower())
    assert report["schema"] == "vgen.eval/1"
    assert (report["n_samples"], report["n_reference"]) == (33, 60)
    assert report["label_histogram"] == {"min": 8, "max": 9, "num_classes": 4}
    assert report["extractor"]["name"] == "tiny"
    assert report["extractor"]["sha256"]
    assert report["estimator"]["seed"] == 3
    assert report["comparable_with_published"] is False
    assert report["provenance"]["config"]["evaluation"]["seed"] == 3
    assert report["provenance"]["git_commit"]
    assert report["provenance"]["world_size"] == 1
    assert [p.name for p in files.glob(".*")] == []


def test_too_few_pictures_and_unequal_sizes_warn(files):
    save_npz(files / "samples.npz", 9, seed=1, size=16)
    report = run(files, "evaluation.metrics=[fd,kid]", f"evaluation.features={files}/tiny.pt")
    warnings = " ".join(report["warnings"])
    assert "fewer than the 12 feature dimensions" in warnings
    assert "samples are 16x16, the reference 12x12" in warnings
    assert "kid subsets hold 9 pictures" in warnings


def test_num_samples_is_checked_and_cuts(files):
    report = run(files, "num_samples=20", "evaluation.metrics=[nearest]")
    assert report["n_samples"] == 20
    assert "only the first 20 of 33" in report["warnings"][0]
    with pytest.raises(UserError, match=r"num_samples=40 were asked for but .* holds 33"):
        run(files, "num_samples=40")


def test_what_does_not_apply_is_named_and_if_nothing_applies_refused(files):
    save_npz(files / "samples.npz", 33, seed=1, labels=False)
    report = run(files)
    assert "no labels" in report["skipped"]["classifier"]
    assert "job=reconstruction" in report["skipped"]["psnr"]
    assert set(report["metrics"]) == {
        "nearest_ratio",
        "nearest_distance",
        "nearest_distance_real",
        "nearest_close",
        "nearest_exact",
    }
    with pytest.raises(UserError, match="none of them applies"):
        run(files, "evaluation.metrics=[classifier,psnr]")
    save_script(FeaturesOnly(), files / "bare.pt")
    bare = run(files, "evaluation.metrics=[fd,isc]", f"evaluation.features={files}/bare.pt")
    assert "no logits" in bare["skipped"]["isc"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.metrics=[fvf]"], "unknown fvf; choose from"),
        (["evaluation.metrics=[]"], "is empty"),
        (["evaluation.metrics=fd"], "must be a list"),
        (["evaluation.metrics=[fd]"], "evaluation.features is not set"),
        (["evaluation.metrics=[fid]", "evaluation.features=FILES/tiny.pt"], "ask for fd"),
        (["evaluation=fid"], "weights of Inception .* not found"),
        (["evaluation.batch_size=0"], "evaluation.batch_size=0 must be"),
        (["evaluation.kid_subset_size=1.5"], "evaluation.kid_subset_size=1.5 must be"),
        (["num_samples=0"], "num_samples=0 must be"),
        (["job=draw"], "job=draw is unknown"),
        (["job=reconstruction"], "33 reconstructions but .* 60 originals"),
        (["checkpoint=x"], "both samples= and checkpoint="),
        (["checkpoint=nowhere", "samples=null"], "nowhere is not a release folder"),
        (["samples=null"], "nothing to score"),
        (["reference=data"], "add data=<name>"),
        (["reference=FILES/none"], "reference=.*none does not exist"),
        (["data=digits", "reference=data"], "choose a data set of the samples' size"),
        (["out=FILES"], "is a folder"),
        (["out=/proc/vgen/report.json"], "out=/proc/vgen cannot be written"),
        (["device=nodevice"], "device=nodevice is not a device"),
    ],
)
def test_mistakes_end_in_one_error(files, monkeypatch, overrides, message):
    monkeypatch.setenv("VGEN_WEIGHTS", str(files / "w"))
    monkeypatch.setenv("TORCH_HOME", str(files / "t"))
    with pytest.raises(UserError, match=message) as caught:
        run(files, *[o.replace("FILES", str(files)) for o in overrides])
    assert "\n" not in str(caught.value)


def test_labels_out_of_range_are_refused(files):
    pictures = np.zeros((4, 12, 12, 3), np.uint8)
    np.savez(files / "samples.npz", pictures, np.array([0, 1, 2, 9]))
    with pytest.raises(UserError, match=r"label 9 but the reference knows the classes 0\.\.3"):
        run(files)
    with pytest.raises(UserError, match=r"label 9 but the extractor knows the classes 0\.\.3"):
        run(files, "evaluation.metrics=[accuracy]", f"evaluation.features={files}/tiny.pt")


def test_reconstruction_of_a_tokenizer(files):
    release = save_tokenizer(files / "release")
    report = evaluate(
        compose_config(
            f"checkpoint={release}",
            f"reference={files}/real.npz",
            "device=cpu",
            "evaluation.metrics=[psnr,ssim,codebook,fd,classifier]",
            f"evaluation.features={files}/tiny.pt",
        )
    )
    metrics = report["metrics"]
    assert report["job"] == "reconstruction"
    assert set(metrics) == {
        "psnr",
        "ssim",
        "codebook_usage",
        "codebook_entropy_bits",
        "codebook_perplexity",
        "rfd_tiny",
    }
    assert 0 < metrics["psnr"] < 30
    assert metrics["codebook_perplexity"] == pytest.approx(2 ** metrics["codebook_entropy_bits"])
    assert 1 / 16 <= metrics["codebook_usage"] <= 1
    assert metrics["codebook_perplexity"] <= 16 * metrics["codebook_usage"]
    assert report["skipped"] == {"classifier": "needs job=samples"}
    assert (files / "release.report_reconstructions.png").is_file()
    options = (f"checkpoint={release}", f"reference={files}/real.npz", "device=cpu", "evaluation.metrics=[psnr]")
    truncated = evaluate(compose_config(*options, "evaluation.quantise=titok"))
    assert (report["pixels"]["quantise"], truncated["pixels"]["quantise"]) == ("round", "titok")
    assert truncated["metrics"]["psnr"] != metrics["psnr"]
    with pytest.raises(UserError, match="quantise=floor is unknown; choose one of round, adm"):
        evaluate(compose_config(*options, "evaluation.quantise=floor"))
    with pytest.raises(UserError, match="job=reconstruction"):
        evaluate(compose_config(f"checkpoint={release}", "job=samples", f"reference={files}/real.npz"))
    with pytest.raises(UserError, match="made for 12x12 pictures but digits val has 16x16"):
        evaluate(compose_config(f"checkpoint={release}", "data=digits"))


def test_samples_drawn_from_a_generator_do_not_depend_on_the_batch_size(files):
    generator = save_generator(files / "generator", save_tokenizer(files / "release"))
    report, other = (
        evaluate(
            compose_config(
                f"{key}={generator}",
                f"reference={files}/real.npz",
                "device=cpu",
                "num_samples=10",
                f"sample_batch_size={size}",
                "evaluation.metrics=[fd,accuracy]",
                f"evaluation.features={files}/tiny.pt",
                "sampling.temperature=0.5",
                f"out={files}/{size}.json",
            )
        )
        for key, size in (("checkpoint", 4), ("samples", 10))
    )
    assert report["n_samples"] == 10
    assert report["label_histogram"] == {"min": 2, "max": 3, "num_classes": 4}
    assert report["sampling"]["temperature"] == 0.5
    assert report["sampling"]["labels"] == "balanced"
    assert report["sampling"]["forward_passes"] == 36
    assert len(report["sampling"]["sha256"]) == len(report["sampling"]["tokenizer_sha256"]) == 64
    assert other["metrics"]["fd_tiny"] == pytest.approx(report["metrics"]["fd_tiny"], rel=1e-4)


def test_a_killed_job_goes_on_with_the_samples_that_are_there(files, monkeypatch):
    generator = save_generator(files / "generator", save_tokenizer(files / "release"))
    config = compose_config(
        f"checkpoint={generator}",
        f"reference={files}/real.npz",
        "device=cpu",
        "num_samples=10",
        "sample_batch_size=3",
        "metrics=[fd]",
        f"evaluation.features={files}/tiny.pt",
    )
    generate, made = Pipeline.generate_ids, []

    def limited(self, labels, index, sampling, **options):
        if len(made) == 6:
            raise KeyboardInterrupt
        made.extend(index.tolist())
        return generate(self, labels, index, sampling, **options)

    monkeypatch.setattr(Pipeline, "generate_ids", limited)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    monkeypatch.setattr(Pipeline, "generate_ids", generate)
    monkeypatch.setattr(Pipeline, "generate_ids", lambda *a, **b: made.extend(a[2].tolist()) or generate(*a, **b))
    report = evaluate(config)
    assert sorted(made) == list(range(10))
    assert report["n_samples"] == 10
    again = evaluate(config)
    assert len(made) == 10
    assert again["metrics"] == report["metrics"]
    with pytest.raises(UserError, match=r"samples of another run \(different sampling\)"):
        evaluate(OmegaConf.merge(config, {"sampling": {"temperature": 0.7}}))
    evaluate(OmegaConf.merge(config, {"keep_samples": False}))
    assert not (files / "generator_samples").exists()


def test_pictures_stored_without_scaling_are_refused(files):
    pictures, labels = quadrant_pictures(33, seed=1)
    np.savez(files / "samples.npz", (pictures > 128).astype(np.uint8), labels)
    with pytest.raises(UserError, match=r"33 of 33 pictures of .* hold only the values 0 and 1"):
        run(files, "metrics=[fd]", f"evaluation.features={files}/tiny.pt")


def _failing_worker(rank, files, port):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    message = r"processes failed" if rank == 0 else r"001\.png cannot be read"
    with pytest.raises(UserError, match=message):
        evaluate(
            compose_config(
                *common(files, "metrics=[fd]", f"evaluation.features={files}/tiny.pt"), f"samples={files}/bad"
            )
        )


@pytest.mark.slow
def test_a_failure_in_one_process_stops_both(files, unused_ports):
    (files / "bad").mkdir()
    for i, picture in enumerate(quadrant_pictures(4, seed=0)[0]):
        Image.fromarray(picture).save(files / "bad" / f"{i:03d}.png")
    (files / "bad" / "001.png").write_bytes(b"")
    multiprocessing.spawn(_failing_worker, (files, unused_ports[0]), nprocs=2)


def _worker(rank, files, ports):
    torch.set_num_threads(1)
    for overrides, port in zip(_shared_jobs(files, f"two{rank}"), ports, strict=True):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        evaluate(compose_config(*overrides))


def _shared_jobs(files, name):
    extractor = f"evaluation.features={files}/tiny.pt"
    yield (*common(files, EVERYTHING, extractor), f"out={files}/{name}_samples.json")
    yield (
        f"checkpoint={files}/release",
        f"reference={files}/real.npz",
        "num_samples=31",
        "device=cpu",
        *SMALL,
        "evaluation.metrics=[psnr,ssim,codebook,fd]",
        extractor,
        f"out={files}/{name}_reconstruction.json",
    )


@pytest.mark.slow
def test_two_processes_give_what_one_gives(files, unused_ports):
    save_tokenizer(files / "release")
    for overrides in _shared_jobs(files, "one"):
        evaluate(compose_config(*overrides))
    multiprocessing.spawn(_worker, (files, unused_ports), nprocs=2)
    for job in ("samples", "reconstruction"):
        one, two = (json.loads((files / f"{name}_{job}.json").read_text()) for name in ("one", "two0"))
        assert two["provenance"]["world_size"] == 2
        assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-9, abs=1e-12)
        assert list(two["metrics"]) == list(one["metrics"])
        assert two["n_samples"] == one["n_samples"]
        assert not (files / f"two1_{job}.json").exists()
