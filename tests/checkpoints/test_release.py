import errno
import shutil

import pytest
import torch
import yaml

from tests.checkpoints.helpers import GENERATOR, SCHEDULE, TOKENIZER, tiny_release
from vgen.checkpoints import release
from vgen.checkpoints.release import build, load_generator, load_pipeline, load_tokenizer, save_release
from vgen.errors import UserError
from vgen.sampling.settings import Sampling

CPU = torch.device("cpu")


def test_round_trip_gives_the_same_samples(tmp_path):
    folder = tiny_release(tmp_path)
    labels, index = torch.tensor([0, 2]), torch.tensor([4, 5])
    one = load_pipeline(folder, device=CPU).generate(labels, index, Sampling())
    moved = shutil.move(folder, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "tokenizer")
    two = load_pipeline(moved, device=CPU).generate(labels, index, Sampling())
    assert one.shape == (2, 3, 8, 8)
    assert one.dtype == torch.uint8
    assert torch.equal(one, two)


def test_half_precision_keeps_the_rotary_table_exact(tmp_path):
    pipeline = load_pipeline(tiny_release(tmp_path), device=CPU, dtype=torch.bfloat16)
    assert pipeline.generator.dtype == torch.bfloat16
    assert pipeline.generator.rotary.table.dtype == torch.float32
    exact = load_generator(tmp_path / "generator")[0].rotary.table
    assert torch.equal(pipeline.generator.rotary.table, exact)


def test_loaded_networks_are_frozen_and_in_eval_mode(tmp_path):
    tokenizer = load_tokenizer(tiny_release(tmp_path))
    assert not tokenizer.training
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


@pytest.mark.parametrize("size", [10, 1000])
def test_truncated_weights_are_one_clear_error(tmp_path, size):
    folder = tiny_release(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(UserError, match="truncated"):
        load_pipeline(folder, device=CPU)


def test_weights_of_another_architecture_are_named(tmp_path):
    folder = tiny_release(tmp_path)
    path = folder / "config.yaml"
    document = yaml.safe_load(path.read_text())
    document["network"]["depth"] = 2
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(UserError, match=r"does not fit .* missing: layers\.1"):
        load_generator(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"vocab_size": 17}, "codebook of 16"), ({"grid": [2, 8]}, r"tokenizer's grid \(4, 4\)")],
)
def test_generator_and_tokenizer_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_pipeline(tiny_release(tmp_path, generator=change), device=CPU)


def test_wrong_kind_and_missing_folder_are_refused(tmp_path):
    folder = tiny_release(tmp_path)
    with pytest.raises(UserError, match="release of a tokenizer"):
        load_generator(folder / "tokenizer")
    with pytest.raises(UserError, match=r"config\.yaml is missing"):
        load_generator(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "target", ["os.system", "vgen.runtime.subprocess.run", "vgen.runtime.os.system", "builtins.eval"]
)
def test_a_release_cannot_run_foreign_code(target):
    with pytest.raises(UserError, match="refusing"):
        build({"_target_": target, "_args_": ["true"]})
    with pytest.raises(UserError, match="refusing"):
        build(GENERATOR | {"condition": {"_target_": target}})


def test_bad_constructor_arguments_become_one_line():
    with pytest.raises(UserError, match="bogus"):
        build(TOKENIZER | {"bogus": 1})
    with pytest.raises(UserError, match=r"^generator\.dim"):
        build(GENERATOR | {"heads": 3})


def test_full_disk_keeps_the_old_release(tmp_path, monkeypatch):
    folder = tiny_release(tmp_path)
    before = (folder / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(release, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save_release(folder, build(GENERATOR), GENERATOR, kind="generator", extra={"schedule": SCHEDULE})
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_schedule_the_network_was_not_trained_for_is_refused_with_the_possible_ones(tmp_path):
    folder = tiny_release(tmp_path)
    other = {"_target_": "vgen.schedules.diagonal.diagonal", "_partial_": True, "first": "right"}
    with pytest.raises(UserError, match=r"trained with 'raster'; choose one of raster, zipar$"):
        load_pipeline(folder, device=CPU, schedule=other)
    zipar = {"_target_": "vgen.schedules.zipar.zipar", "_partial_": True, "window": 2}
    zipar |= {"cache": "strict", "overlap_first_row": False}
    pipeline = load_pipeline(folder, device=CPU, schedule=zipar)
    assert len(pipeline.plan.forwards) == 2 * 4 + 2 * 2
    labels, index = torch.tensor([0, 1]), torch.tensor([0, 1])
    assert pipeline.generate(labels, index, Sampling()).shape == (2, 3, 8, 8)


def test_a_cache_that_is_never_kept_has_no_dtype(tmp_path):
    schedule = {"_target_": "vgen.schedules.masked.masked", "_partial_": True, "steps": 2}
    release = tiny_release(tmp_path, generator={"mask_token": True}, schedule=schedule)
    where = {"device": torch.device("cpu")}
    assert load_pipeline(release, **where).generator.cache_dtype is None
    with pytest.raises(UserError, match="cache_dtype has no effect: schedule 'masked' keeps no keys"):
        load_pipeline(release, **where, cache_dtype=torch.float8_e4m3fn)
