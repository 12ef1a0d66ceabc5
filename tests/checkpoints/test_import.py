import pytest
import torch
import yaml

from tests.paths import CONFIGS
from vgen.checkpoints import __main__ as importer
from vgen.checkpoints import llamagen_gpt, llamagen_vq, maskgit, par, randar, rar, titok
from vgen.checkpoints.release import build, load_pipeline
from vgen.errors import UserError
from vgen.generators.conditioning import ClassCondition
from vgen.generators.transformer import Transformer
from vgen.sampling.settings import Sampling

TOKENS = {
    "_target_": "vgen.tokenizers.vqgan.VQGAN",
    "image_size": 16,
    "base_channels": 8,
    "encoder_multipliers": [1, 1, 1],
    "decoder_multipliers": [1, 1, 1],
    "num_res_blocks": 1,
    "z_channels": 8,
    "codebook_size": 32,
    "codebook_dim": 4,
    "norm_groups": 4,
}
SIZES = {"dim": 32, "depth": 1, "heads": 2, "ffn_multiple_of": 16}


MASKGIT_TOKENS = {
    "_target_": "vgen.tokenizers.maskgit_vqgan.MaskGITVQGAN",
    "image_size": 16,
    "base_channels": 8,
    "multipliers": [1, 1, 2],
    "num_res_blocks": 1,
    "z_channels": 8,
    "codebook_size": 32,
    "norm_groups": 4,
}


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """Presets small enough for a test, in the place of the real ones; the schedules stay."""
    folder = tmp_path / "configs"
    presets = {
        "tokenizer/vq16": TOKENS,
        "tokenizer/maskgit_vqgan": MASKGIT_TOKENS,
        "generator/l": {"defaults": ["base", "_self_"]} | SIZES,
    }
    for name, content in presets.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (folder / "schedule").symlink_to(importer.CONFIGS / "schedule")
    monkeypatch.setattr(importer, "CONFIGS", folder)


def published(tmp_path, to_published=llamagen_gpt.to_published, **needs):
    """Files as the authors publish them, with random weights; returns their paths and our generator."""
    torch.manual_seed(0)
    tokenizer = build(TOKENS)
    torch.save({"model": llamagen_vq.to_published(tokenizer.state_dict())}, tmp_path / "vq.pt")
    condition = ClassCondition(num_classes=1000, dim=32)
    generator = Transformer(vocab_size=32, grid=(4, 4), condition=condition, **SIZES, **needs).eval()
    torch.nn.init.normal_(generator.outputs[0].weight)
    torch.save({"model": to_published(generator.state_dict()), "steps": 3}, tmp_path / "gpt.pt")
    return generator


def run(tmp_path, *extra):
    files = ["--vq", str(tmp_path / "vq.pt"), "--generator", str(tmp_path / "gpt.pt"), "--out", str(tmp_path / "out")]
    importer.main([*files, "--image-size", "16", *extra])


def test_published_files_become_a_release_that_samples_alike(tmp_path, configs, capsys):
    generator = published(tmp_path)
    run(tmp_path)
    assert str(tmp_path / "out") in capsys.readouterr().out
    pipeline = load_pipeline(tmp_path / "out", device=torch.device("cpu"))
    labels, index = torch.tensor([7, 999]), torch.tensor([0, 1])
    pictures = pipeline.generate(labels, index, Sampling())
    assert pictures.shape == (2, 3, 16, 16)
    ids = torch.randint(32, (2, 16))
    expected = generator.logits(ids, labels, pipeline.plan)
    assert torch.equal(pipeline.generator.logits(ids, labels, pipeline.plan), expected)


def test_orders_with_options_are_imported_too(tmp_path, configs):
    published(tmp_path, par.to_published, num_learned=3)
    run(tmp_path, "--family", "par", "--schedule", '{"regions": 4}')
    pipeline = load_pipeline(tmp_path / "out", device=torch.device("cpu"))
    assert len(pipeline.plan.forwards) == 4 - 1 + 16 // 4


def test_position_queries_are_imported(tmp_path, configs):
    published(tmp_path, randar.to_published, position_queries=True)
    run(tmp_path, "--family", "randar", "--schedule", '{"steps": 5}')
    pipeline = load_pipeline(tmp_path / "out", device=torch.device("cpu"))
    assert len(pipeline.plan.forwards) == 5


def rar_generator(tmp_path):
    """A RAR as published, with random weights: a prefix slot, joint tables, a head that swaps scale and shift."""
    switches = yaml.safe_load((CONFIGS / "generator" / "rar_base.yaml").read_text())
    switches |= {"dim": 32, "depth": 1, "heads": 2, "ffn_hidden": 48}
    for name, content in (("rar_base", switches), ("rar_b", {"defaults": ["rar_base", "_self_"]})):
        (importer.CONFIGS / "generator" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    options = {key: value for key, value in switches.items() if key not in ("_target_", "condition")}
    condition = ClassCondition(num_classes=1000, dim=32, num_prefix=1)
    generator = Transformer(vocab_size=32, grid=(4, 4), condition=condition, **options).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save(rar.to_published(generator.state_dict()), tmp_path / "gpt.pt")
    return generator


def maskgit_tokenizer(tmp_path):
    """A MaskGIT-VQGAN as published, with random weights."""
    torch.manual_seed(1)
    tokenizer = build(MASKGIT_TOKENS).eval()
    torch.save(titok.to_published(tokenizer.state_dict()), tmp_path / "vq.pt")
    return tokenizer


def test_presets_with_parents_are_imported_whole(tmp_path, configs):
    """RAR with its own tokenizer."""
    tokenizer, generator = maskgit_tokenizer(tmp_path), rar_generator(tmp_path)
    run(tmp_path, "--vq-preset", "maskgit_vqgan", "--family", "rar", "--size", "rar_b")
    pipeline = load_pipeline(tmp_path / "out", device=torch.device("cpu"))
    ids, labels = torch.randint(32, (2, 16)), torch.tensor([7, 999])
    expected = generator.logits(ids, labels, pipeline.plan)
    assert torch.equal(pipeline.generator.logits(ids, labels, pipeline.plan), expected)

    assert torch.equal(pipeline.tokenizer.decode(ids), tokenizer.decode(ids))
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(pipeline.tokenizer.encode(pixels), tokenizer.encode(pixels))
    assert pipeline.generate(labels, torch.arange(2), Sampling()).shape == (2, 3, 16, 16)


def test_randar_with_the_tokenizer_of_maskgit_is_imported(tmp_path, configs):
    generator = published(tmp_path, randar.to_published, position_queries=True)
    tokenizer = maskgit_tokenizer(tmp_path)
    run(tmp_path, "--vq-preset", "maskgit_vqgan", "--family", "randar", "--schedule", '{"steps": 5}')
    pipeline = load_pipeline(tmp_path / "out", device=torch.device("cpu"))
    ids, labels = torch.randint(32, (2, 16)), torch.tensor([7, 999])
    assert torch.equal(
        pipeline.generator.logits(ids, labels, pipeline.plan), generator.logits(ids, labels, pipeline.plan)
    )
    assert torch.equal(pipeline.tokenizer.decode(ids), tokenizer.decode(ids))


def test_a_tokenizer_imported_earlier_serves_several_generators(tmp_path, configs, capsys):
    tokenizer = maskgit_tokenizer(tmp_path)
    importer.main(f"--vq {tmp_path}/vq.pt --vq-preset maskgit_vqgan --image-size 16 --out {tmp_path}/tokens".split(" "))
    rar_generator(tmp_path)
    given = ["--tokenizer", str(tmp_path / "tokens"), "--out", str(tmp_path / "rar")]
    importer.main([*given, "--generator", str(tmp_path / "gpt.pt"), "--family", "rar", "--size", "rar_b"])
    assert not (tmp_path / "rar_tokenizer").exists()
    ids = torch.randint(32, (2, 16))
    pipeline = load_pipeline(tmp_path / "rar", device=torch.device("cpu"))
    assert torch.equal(pipeline.tokenizer.decode(ids), tokenizer.decode(ids))
    for wrong in (given, ["--vae", "x", "--generator", "y", "--out", "z"]):
        with pytest.raises(SystemExit):
            importer.main(wrong)
    assert "--generator needs --vq or --tokenizer" in capsys.readouterr().err


def test_a_tokenizer_of_another_kind_is_named(tmp_path, configs, capsys):
    published(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--vq-preset", "maskgit_vqgan")
    assert stop.value.code == 2
    assert "choose --vq-preset vq16, vq8" in capsys.readouterr().err


def test_masked_generators_are_imported_with_their_mask_token(tmp_path, configs):
    switches = yaml.safe_load((CONFIGS / "generator" / "maskgit_vit.yaml").read_text())
    switches |= {"dim": 32, "depth": 1, "heads": 2, "ffn_hidden": 48}
    (importer.CONFIGS / "generator" / "maskgit_vit.yaml").write_text(yaml.safe_dump(switches))
    published(tmp_path)
    options = {key: value for key, value in switches.items() if key != "defaults"}
    condition = ClassCondition(num_classes=1000, dim=32)
    generator = Transformer(vocab_size=32, grid=(4, 4), condition=condition, mask_token=True, **options).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save(maskgit.to_published(generator.state_dict()), tmp_path / "gpt.pt")
    run(tmp_path, "--family", "maskgit", "--size", "maskgit_vit", "--schedule", '{"steps": 5}')
    pipeline = load_pipeline(tmp_path / "out", device=torch.device("cpu"))
    assert len(pipeline.plan.forwards) == 5
    ids, labels, hidden = torch.randint(32, (2, 16)), torch.tensor([7, 999]), torch.rand(2, 16) < 0.5
    expected = generator.logits(ids, labels, pipeline.plan, hidden=hidden)
    assert torch.equal(pipeline.generator.logits(ids, labels, pipeline.plan, hidden=hidden), expected)


@pytest.mark.parametrize("missing", ["pos_embed", "cls_token"])
def test_files_that_are_no_rar_weights_are_named(missing):
    with pytest.raises(UserError, match=f"no RAR weights: .*{missing}"):
        rar.to_ours({"lm_head.weight": torch.zeros(3, 2)})


def test_wrong_files_and_sizes_are_named(tmp_path, configs, capsys):
    published(tmp_path)
    for extra in (["--family", "par"], ["--size", "nothing"]):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, *extra)
        assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert "learned_embeddings" in errors
    assert "--size nothing is no preset" in errors
    with pytest.raises(UserError, match="no weight file"):
        importer.import_tokenizer(tmp_path / "absent.pt", "vq16", 16, tmp_path / "t")
