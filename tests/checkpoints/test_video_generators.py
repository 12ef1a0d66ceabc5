"""Published LARP and NAR video generators: built from what their files say, strictly."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.paths import ROOT
from vgen.checkpoints import larp_ar, nar
from vgen.errors import UserError
from vgen.generators.conditioning import TokenCondition

GOLDEN = ROOT / "tests" / "golden"
CASES = {
    "labels": (larp_ar, larp_ar.load_larp_ar, GOLDEN / "larp" / "ar_forward"),
    "frames": (larp_ar, larp_ar.load_larp_ar, GOLDEN / "larp" / "ar_fp_forward"),
    "nar": (nar, nar.load_nar_video, GOLDEN / "nar" / "video_forward"),
    "fixed": (nar, nar.load_nar_video, GOLDEN / "nar" / "video_forward_fixed_pe"),
}


@pytest.fixture(params=sorted(CASES))
def case(request):
    converter, load, path = CASES[request.param]
    tensors = load_file(path.with_suffix(".safetensors"))
    state = {name[3:]: value for name, value in tensors.items() if name.startswith("sd.")}
    return converter, load, json.loads(path.with_suffix(".json").read_text())["config"], state


def test_a_hub_folder_and_a_trainers_file_give_the_same_network(case, tmp_path):
    converter, load, config, state = case
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file(state, hub / "model.safetensors")
    (hub / "config.json").write_text(json.dumps(config))
    cache = {"layers.0.attention.kv_cache.k_cache": torch.zeros(2)}
    torch.save({"model": {"name": "llama-abs", "args": config, "sd": state | cache}, "epoch": 1}, tmp_path / "last.pth")
    (one, network, plan), (two, _, _) = load(hub), load(tmp_path / "last.pth")
    one.check_plan(plan)
    assert network["vocab_size"] == config["vocab_size"]
    assert isinstance(one.condition, TokenCondition) == config["frame_prediction"]
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    published = converter.to_published(one.state_dict())
    assert published.keys() == state.keys()
    assert all(torch.equal(published[name], value) for name, value in state.items())


def test_a_missing_tensor_is_named(case, tmp_path):
    _, load, config, state = case
    state = {name: value for name, value in state.items() if name != "layers.1.attention.wo.weight"}
    torch.save({"model": {"args": config, "sd": state}}, tmp_path / "last.pth")
    with pytest.raises(UserError, match=r"1 missing: layers\.1\.attention\.wo\.weight"):
        load(tmp_path / "last.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_type": "text_cond"}, "model_type=text_cond"), ({"vocab_size": None}, "vocab_size")],
)
def test_what_a_file_does_not_say_or_we_do_not_know_is_named(case, tmp_path, change, message):
    _, load, config, state = case
    config = {name: value for name, value in (config | change).items() if value is not None or name == "n_kv_head"}
    torch.save({"model": {"args": config, "sd": state}}, tmp_path / "last.pth")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "last.pth")
