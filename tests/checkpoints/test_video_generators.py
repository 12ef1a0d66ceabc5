"""Published LARP and NAR video generators: built from what their files say, strictly."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.paths import ROOT
from vgen.checkpoints import larp_ar, nar
from vgen.checkpoints.release import build, load_pipeline
from vgen.checkpoints.video import main
from vgen.errors import UserError
from vgen.generators.conditioning import TokenCondition
from vgen.sampling.settings import Sampling

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


def test_a_generator_becomes_a_release_that_samples(tmp_path):
    tensors = load_file(GOLDEN / "larp" / "tokenizer_plain_vq.safetensors")
    document = json.loads((GOLDEN / "larp" / "tokenizer_plain_vq.json").read_text())
    state = {name[3:]: value for name, value in tensors.items() if name.startswith("sd.") and "prior" not in name}
    torch.save({"model": {"args": document["config"], "sd": state}}, tmp_path / "tokenizer.pth")
    tokens = document["config"]["bottleneck_token_num"]
    codes = len(state["bottleneck.regularizer.embedding.weight"])
    for family, converter, grid in (("larp", larp_ar, (tokens,)), ("nar", nar, (1, 2, tokens // 2))):
        config = {"dim": 16, "n_layer": 1, "n_head": 2, "multiple_of": 16, "vocab_size": codes, "num_classes": 3}
        config |= {"max_seq_len": tokens, "latent_shape": list(grid)}
        plan = larp_ar.plan_of(config) if family == "larp" else nar.video_plan_of(config)
        generator = build(larp_ar.generator_arguments(config, plan, last_position=family == "nar"))
        state = converter.to_published(generator.state_dict())
        torch.save({"model": {"args": config, "sd": state}}, tmp_path / "generator.pth")
        out = tmp_path / family
        files = ["--tokenizer", str(tmp_path / "tokenizer.pth"), "--generator", str(tmp_path / "generator.pth")]
        main([*files, "--family", family, "--out", str(out)])
        pipeline = load_pipeline(out, device=torch.device("cpu"))
        assert pipeline.plan.grid == grid
        index = torch.arange(2)
        clips = pipeline.generate(index, index, Sampling())
        assert clips.shape == (2, 3, *pipeline.sample_shape)
        with pytest.raises(UserError, match="belong to no frame"):
            load_pipeline(out, device=torch.device("cpu"), num_frames=100)
