"""Published MaskGIT generators load strictly and survive the way back."""

import pytest
import torch
import yaml

from tests.paths import CONFIGS
from vgen.checkpoints.maskgit import load_maskgit, to_ours, to_published
from vgen.errors import UserError
from vgen.generators.conditioning import ClassCondition
from vgen.generators.transformer import Transformer
from vgen.schedules.masked import masked

SIZES = {"dim": 16, "depth": 3, "heads": 2, "ffn_hidden": 24}
TYPES = "model.embeddings.token_type_embeddings.weight"


def network(backbone, seed):
    options = yaml.safe_load((CONFIGS / "generator" / f"maskgit_{backbone}.yaml").read_text())
    options = {key: value for key, value in options.items() if key != "defaults"} | SIZES
    torch.manual_seed(seed)
    condition = ClassCondition(num_classes=3, dim=16)
    generator = Transformer(vocab_size=8, grid=(5,), condition=condition, mask_token=True, **options).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return generator


def logits(generator):
    plan = masked(grid=(5,), steps=2)
    ids, hidden = torch.arange(10).view(2, 5) % 8, torch.tensor([[True, False, True, False, True]] * 2)
    with torch.inference_mode():
        return generator.logits(ids, torch.tensor([0, 2]), plan, hidden=hidden)


@pytest.mark.parametrize("backbone", ["vit", "uvit"])
@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_a_published_file_loads(backbone, ending, tmp_path):
    from safetensors.torch import save_file

    theirs, ours = network(backbone, 0), network(backbone, 1)
    assert not torch.allclose(logits(theirs), logits(ours), atol=1e-2)
    path, state = tmp_path / f"generator.{ending}", to_published(theirs.state_dict())
    state = {name: value.contiguous().clone() for name, value in state.items()}
    if ending == "bin":
        torch.save(state, path)
    else:
        save_file(state, path)
    load_maskgit(ours, path)
    assert torch.equal(logits(theirs), logits(ours))
    again = to_published(to_ours(state))
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_token_types_are_part_of_the_positions_and_old_buffers_are_ignored():
    state = to_published(network("vit", 0).state_dict())
    plain = to_ours(state)
    state[TYPES] = torch.arange(32.0).view(2, 16)
    state["model.embeddings.position_ids"] = torch.arange(6)[None]
    moved = to_ours(state)
    assert torch.equal(moved["places.own.weight"], plain["places.own.weight"] + torch.arange(16.0))
    assert set(moved) == set(plain)


@pytest.mark.parametrize(
    ("backbone", "change", "message"),
    [
        ("vit", {"model.encoder.layer.1.attention.self.key.bias": None}, "key of .*layer.1.attention.wqkv.bias"),
        ("vit", {"model.lm_head.bias": None}, "1 missing: outputs.0.bias"),
        ("uvit", {"in_blocks.0.norm1.bias": None}, "1 missing: layers.0.attention_norm.bias"),
        ("uvit", {"more.weight": torch.zeros(1)}, "1 unknown: more.weight"),
        ("uvit", {"pos_embed": torch.zeros(1, 9, 16)}, "places.own.weight .9, 16. instead of .6, 16."),
        ("vit", {"model.embeddings.word_embeddings.weight": None}, "no MaskGIT weights"),
    ],
)
def test_differences_are_named(backbone, change, message, tmp_path):
    generator = network(backbone, 0)
    state = to_published(generator.state_dict()) | change
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "g.bin")
    with pytest.raises(UserError, match=message):
        load_maskgit(generator, tmp_path / "g.bin")


def test_a_file_of_the_other_backbone_is_refused(tmp_path):
    torch.save(to_published(network("vit", 0).state_dict()), tmp_path / "g.bin")
    with pytest.raises(UserError, match="does not fit the configured network"):
        load_maskgit(network("uvit", 0), tmp_path / "g.bin")
