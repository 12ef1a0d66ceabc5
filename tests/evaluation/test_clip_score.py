import json

import pytest
import torch

from vgen.errors import UserError
from vgen.evaluation.clip_score import load_clip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP of random weights over single letters, as a copy of a hub repository lies on the disk."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder))
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    images.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = len(vocabulary) - 1
    config = transformers.CLIPConfig(
        text_config=sizes
        | {"vocab_size": len(vocabulary), "max_position_embeddings": 12, "bos_token_id": end - 1, "eos_token_id": end},
        vision_config=sizes | {"image_size": 8, "patch_size": 4},
        projection_dim=6,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def pictures(count=3):
    return torch.randint(0, 256, (count, 3, 10, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_scores_belong_to_pairs(folder):
    scorer = load_clip(folder, device=CPU)
    captions = ["a cat", "dogs", "blue sky"]
    values = scorer(pictures(), captions)
    assert values.dtype == torch.float64
    assert values.abs().max() <= 1
    alone = torch.cat([scorer(pictures()[i : i + 1], [captions[i]]) for i in range(3)])
    torch.testing.assert_close(values, alone, atol=1e-5, rtol=0)
    other = scorer(pictures(), [captions[2], captions[0], captions[1]])
    assert (values - other).abs().min() > 1e-6
    assert scorer(pictures(1), ["x" * 500]).isfinite().all()
    assert scorer.describe()["name"] == "tiny-clip"


def test_one_8_bit_picture_per_caption(folder):
    scorer = load_clip(folder, device=CPU)
    with pytest.raises(UserError, match="there are 1 for 3"):
        scorer(pictures(), ["one"])
    with pytest.raises(UserError, match="must be uint8"):
        scorer(pictures().float(), ["a", "b", "c"])


def test_missing_and_damaged_files(folder, tmp_path):
    with pytest.raises(UserError, match=r"lacks config.json, .* or pytorch_model.bin.*nothing is downloaded"):
        load_clip(tmp_path, device=CPU)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_clip(tmp_path, device=CPU)
