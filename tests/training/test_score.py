"""The score during training: right, of the averaged weights, and no hang when processes have unequal work."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.helpers import GENERATOR, TOKENIZER, column, few_digits, launch, load, run, score_of
from vgen.checkpoints.release import load_pipeline, load_tokenizer
from vgen.errors import UserError
from vgen.evaluation.features import load_extractor
from vgen.evaluation.frechet import frechet_distance, gaussian_of
from vgen.evaluation.metrics import kernel_distance
from vgen.evaluation.readers import DatasetPictures
from vgen.pixels import from_uint8, to_uint8
from vgen.sampling.pipeline import make_labels
from vgen.sampling.settings import Sampling


def features(file, pictures):
    return load_extractor(str(file), name=None, weights=None, device=torch.device("cpu"))(pictures)[0]


def held_out():
    return DatasetPictures(few_digits(image_size=8, shift=0, val_fraction=0.165, seed=0).val, "val")


def real_features(file):
    return features(file, held_out().read(range(41)))


def sample_features(file, release, count):
    pipeline = load_pipeline(release, device=torch.device("cpu"))
    labels = make_labels("balanced", count, pipeline.num_classes, seed=0)
    return features(file, pipeline.generate(labels, torch.arange(count), Sampling()))


def generator(tokenizer_release):
    return [*GENERATOR, f"task.tokenizer={tokenizer_release}"]


def test_a_generator_is_scored_every_epoch_with_its_averaged_weights(tokenizer_release, extractor_file, tmp_path):
    # 180 pictures in batches of 60: three steps are an epoch
    settings = [*generator(tokenizer_release), *score_of(extractor_file, 7), "task.batch_size=60"]
    result = run(tmp_path / "run", *settings, "score.every_epochs=1", "trainer.max_steps=7")
    values = column(result, "score/fd_tiny_n7")
    assert len(values) == 3  # after steps 3 and 6, and at the end
    real, made = real_features(extractor_file), sample_features(extractor_file, result.release, 7)
    assert values[-1] == pytest.approx(frechet_distance(gaussian_of(made), gaussian_of(real)), rel=1e-6)
    best = load(result.checkpoints / "best-score.ckpt")
    assert best["global_step"] == (3, 6, 7)[int(np.argmin(values))]
    last = load(result.checkpoints / "last.ckpt")
    assert min(values) == pytest.approx(next(s["best"] for k, s in last["callbacks"].items() if "Score" in k), rel=1e-9)


def test_a_tokenizer_is_scored_by_its_reconstructions(extractor_file, tmp_path):
    settings = [*TOKENIZER, *score_of(extractor_file, 20, "score.metric=kid", "score.kid_subsets=2")]
    result = run(tmp_path / "run", *settings, "score.every_steps=2", "trainer.max_steps=2")
    originals = DatasetPictures(few_digits(image_size=8, shift=0, val_fraction=0.165, seed=0).val, "val").read(
        range(20)
    )
    tokenizer = load_tokenizer(result.release)
    with torch.inference_mode():
        made = to_uint8(tokenizer.decode(tokenizer.encode(from_uint8(originals))))
    pair = features(extractor_file, made), features(extractor_file, originals)
    expected = kernel_distance(*pair, subsets=2, subset_size=20, seed=0)[0]
    assert column(result, "score/kid_tiny_n20") == pytest.approx([expected], rel=1e-6)


@pytest.mark.slow
def test_two_processes_with_unequal_work(scored_by_two, extractor_file):
    _, two = scored_by_two
    values = column(two, "score/fd_tiny_n7")
    assert len(values) == 3
    real, made = real_features(extractor_file), sample_features(extractor_file, two.release, 7)
    assert values[-1] == pytest.approx(frechet_distance(gaussian_of(made), gaussian_of(real)), rel=1e-9)
    assert (two.checkpoints / "best-score.ckpt").is_file()


@pytest.mark.slow
def test_a_failure_in_one_process_stops_both(tokenizer_release, extractor_file, tmp_path):
    folder = tmp_path / "reference"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes(b"")  # the second process reads it
    settings = [*generator(tokenizer_release), *score_of(extractor_file, 7), "score.every_steps=2"]
    with pytest.raises(AssertionError, match=r"1\.png cannot be read|processes failed"):
        launch(tmp_path / "two", *settings, f"score.reference={folder}", "trainer=ddp_cpu2", torchrun=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["score.every_steps=1"], r"set score\.features"),
        (["score.every_steps=1", "score.every_epochs=1", "score.features=x.pt"], "are both set"),
        (["score.every_steps=1", "score.features=gone.pt"], r"gone\.pt"),
        (
            ["score.every_steps=1", "score.features=FILE", "score.reference=gone"],
            r"reference=gone does not exist",
        ),
        (["score.every_steps=1", "score.features=FILE", "score.metric=fvd"], r"score\.metric=fvd is unknown"),
        (["score.every_steps=-1"], r"score\.every_steps=-1 must be"),
        (["score.every_steps=1", "score.features=FILE", "trainer=fsdp"], "trainer=fsdp"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_training(
    overrides, message, tokenizer_release, extractor_file, tmp_path
):
    overrides = [o.replace("FILE", str(extractor_file)) for o in overrides]
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", *generator(tokenizer_release), *overrides)
    assert not (tmp_path / "run" / "metrics.csv").exists()
