import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.paths import CONFIGS, ROOT
from vgen.checkpoints.larp import load_larp_discriminator, load_larp_tokenizer, main, to_published, tokenizer_arguments
from vgen.checkpoints.release import load_tokenizer
from vgen.errors import UserError
from vgen.losses.larp import ClipDiscriminator, LARPLoss, lecam, smoothed_logistic_discriminator
from vgen.tokenizers.larp import LARP

GOLDEN = ROOT / "tests" / "golden" / "larp" / "tokenizer_deterministic.json"
PRIOR = {"dim": 16, "depth": 2, "heads": 2, "dropout": 0.0}


def small(**changes):
    options = yaml.safe_load((CONFIGS / "tokenizer" / "larp.yaml").read_text())
    del options["_target_"]
    options |= {"image_size": 16, "num_frames": 8, "patch": [4, 8, 8], "num_tokens": 6, "codebook_size": 32}
    options |= {"encoder_dim": 16, "encoder_depth": 2, "encoder_heads": 2, "codebook_dim": 4, "usage_window": 64}
    options |= {"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2, "prior": PRIOR}
    torch.manual_seed(0)
    tokenizer = LARP(**options | changes)
    torch.nn.init.normal_(tokenizer.last_layer, std=0.1)
    return tokenizer


def clips(batch=2, frames=8):
    return torch.rand(batch, 3, frames, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_shapes_and_grid():
    tokenizer = small().eval()
    assert (tokenizer.grid, tokenizer.num_tokens, tokenizer.num_frames) == ((6,), 6, 8)
    assert small(nominal_grid=[1, 2, 3]).grid == (1, 2, 3)
    ids = tokenizer.encode(clips())
    assert ids.shape == (2, 6)
    assert tokenizer.decode(ids).shape == (2, 3, 8, 16, 16)
    assert tokenizer.decode(ids, frames=4).shape == (2, 3, 4, 16, 16)
    assert tokenizer.encode(clips(frames=4)).shape == (2, 6)
    assert tokenizer.codebook.norm(dim=1).allclose(torch.ones(32))


def test_encoding_is_nearest_in_evaluation_and_drawn_on_request():
    tokenizer = small(stochastic_temperature=1.0).eval()
    pixels = clips()
    nearest = tokenizer.encode(pixels)
    assert torch.equal(nearest, tokenizer.encode(pixels))
    assert torch.equal(nearest, tokenizer(pixels).ids)
    drawn = [tokenizer.encode(pixels, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    tokenizer.train()
    assert not torch.equal(tokenizer(pixels).ids, nearest)
    with pytest.raises(UserError, match="stochastic_temperature above 0"):
        small(stochastic_temperature=0.0).encode(pixels, torch.Generator())


def test_draws_follow_the_cosines():
    quantizer = small(stochastic_temperature=0.5).bottleneck.regularizer
    rows = torch.nn.functional.normalize(torch.randn(1, 4), dim=1)
    drawn = quantizer.draw(rows.expand(20000, -1), quantizer.codebook, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=32) / 20000
    assert (share - quantizer.probabilities(rows, quantizer.codebook)[0]).abs().max() < 0.01


def test_training_losses_reach_encoder_decoder_codebook_and_prior():
    tokenizer = small().train()
    output = tokenizer(clips())
    assert output.losses.keys() == {"vq", "commit", "entropy", "prior"}
    # Before any training the prior knows nothing: the cross entropy is near that of guessing.
    assert output.losses["prior"].item() == pytest.approx(0.06 * torch.log(torch.tensor(32.0)).item(), rel=0.2)
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    for name, parameter in tokenizer.named_parameters():
        if name.split(".")[-1] != "bias":
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_the_prior_alone_teaches_the_encoder_but_not_the_codebook():
    tokenizer = small().train()
    tokenizer(clips()).losses["prior"].backward()
    assert tokenizer.bottleneck.regularizer.embedding.weight.grad is None
    assert tokenizer.bottleneck.in_linear.weight.grad.abs().max() > 0
    assert tokenizer.last_layer.grad is None


def test_scheduled_sampling_grows_with_progress_and_keeps_the_first_input():
    prior = small(prior={**PRIOR, "sampled_share": 1.0}).prior_model
    codes, codebook = torch.zeros(3, 6, 4), torch.nn.functional.normalize(torch.randn(32, 4), dim=1)
    logits = torch.randn(3, 5, 32)
    assert torch.equal(prior._mix(codes[:, :-1], logits, codebook, 0.0), codes[:, :-1])
    mixed = prior._mix(codes[:, :-1], logits, codebook, 1.0)
    assert (mixed[:, 0] == 0).all()
    assert mixed[:, 1:].norm(dim=-1).allclose(torch.ones(3, 4))
    ids = torch.zeros(3, 6, dtype=torch.long)
    torch.manual_seed(0)
    start, end = (prior(codes, ids, codebook, progress=progress).logits for progress in (0.0, 1.0))
    assert torch.equal(start[0], start[1])
    assert not torch.equal(end[0], end[1])


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for flag in (False, True):
        tokenizer = small(gradient_checkpointing=flag, stochastic_temperature=0.0, prior=None).train()
        tokenizer(clips()).reconstruction.square().mean().backward()
        gradients.append(tokenizer.x_embedder.proj.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 20}, "image_size=20 must be a multiple"),
        ({"num_frames": 6}, "num_frames=6 must be a positive multiple"),
        ({"nominal_grid": [2, 2]}, "nominal_grid"),
        ({"encoder_heads": 3}, "encoder_dim=16 must be"),
        ({"patch": [4, 8]}, "three positive numbers"),
        ({"prior": {**PRIOR, "heads": 3}}, "prior.dim=16"),
        ({"l2_normalize": False}, "needs tokenizer.l2_normalize=true"),
        ({"entropy_weight": 0.1}, "needs tokenizer.stochastic_temperature=0"),
        ({"prior_weight": -1.0}, "prior_weight=-1.0"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(UserError, match=message):
        small(**changes)


def test_bad_input():
    tokenizer = small()
    with pytest.raises(UserError, match="possible are 4, 8 frames"):
        tokenizer.encode(clips(frames=6))
    with pytest.raises(UserError, match="takes clips"):
        tokenizer.encode(torch.zeros(1, 3, 8, 16, 24))
    with pytest.raises(UserError, match=r"not \[B, 6\]"):
        tokenizer.decode(torch.zeros(1, 5, dtype=torch.long))


# Published files


def published(tmp_path, *, prior=True, **changes):
    config = json.loads(GOLDEN.read_text())["config"] | changes
    sizes = {"dim": 32, "depth": 2, "heads": 2}
    tokenizer = LARP(**tokenizer_arguments(config, prior_sizes=sizes))
    config["prior_model"]["name"] = "gptc-S"
    state = to_published(tokenizer.state_dict())
    if not prior:
        state = {name: value for name, value in state.items() if not name.startswith("prior_model.")}
    folder = tmp_path / "larp"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return folder, tokenizer.eval(), config, state


def test_hub_folder_and_trainer_file_load_without_the_prior(tmp_path):
    folder, tokenizer, config, state = published(tmp_path, prior=False)
    pixels = torch.rand(1, 3, 8, 16, 16) * 2 - 1
    loaded, arguments = load_larp_tokenizer(folder, nominal_grid=(3, 2, 2))
    assert loaded.prior_model is None
    assert loaded.grid == (3, 2, 2)
    assert arguments["_target_"] == "vgen.tokenizers.larp.LARP"
    assert torch.equal(loaded.eval().encode(pixels), tokenizer.encode(pixels))
    torch.save({"model": {"name": "larp", "args": config, "sd": state}, "epoch": 3}, tmp_path / "last.pth")
    again, _ = load_larp_tokenizer(tmp_path / "last.pth")
    assert torch.equal(again.eval().encode(pixels), tokenizer.encode(pixels))
    main([str(folder), str(tmp_path / "release"), "--grid", "3", "2", "2"])
    released = load_tokenizer(tmp_path / "release")
    assert released.grid == (3, 2, 2)
    assert torch.equal(released.encode(pixels), tokenizer.encode(pixels))


def test_patches_of_one_frame_are_published_in_two_dimensions(tmp_path):
    changes = {"temporal_patch_size": 1, "decoder_temporal_patch_size": 1, "frame_num": 3}
    folder, tokenizer, _, state = published(tmp_path, prior=False, **changes)
    assert state["x_embedder.proj.weight"].dim() == 4
    loaded, _ = load_larp_tokenizer(folder)
    pixels = torch.rand(1, 3, 3, 16, 16) * 2 - 1
    assert torch.equal(loaded.eval().encode(pixels), tokenizer.encode(pixels))


def test_files_that_do_not_fit_are_refused(tmp_path):
    folder, _, config, _ = published(tmp_path)
    # The published prior is larger than the golden one.
    with pytest.raises(UserError, match=r"of another shape: prior_model|missing"):
        load_larp_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config | {"learned_encoder_patch_pe": True}))
    with pytest.raises(UserError, match="learned_encoder_patch_pe=True is not supported"):
        load_larp_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="does not describe a LARP tokenizer"):
        load_larp_tokenizer(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"one weight file and one \.json"):
        load_larp_tokenizer(folder)
    with pytest.raises(UserError, match="constructor arguments"):
        load_larp_tokenizer(folder / "model.safetensors")


# Losses


def discriminator():
    torch.manual_seed(0)
    return ClipDiscriminator(image_size=16, num_frames=8, patch=(4, 8, 8), dim=16, depth=1, heads=2)


def loss(**changes):
    options = {"label_noise": 0.15, "lecam_weight": 1e-6, "lecam_decay": 0.9, "discriminator_every": 5}
    options |= {"perceptual": "none", "generator_loss": "non-saturating", "adversarial_start": 1}
    return LARPLoss(**options | changes)


def test_discriminator_steps_every_fifth_time_and_follows_its_logits():
    judge, objective = discriminator(), loss()
    assert [step for step in range(1, 12) if objective.judges(step)] == [5, 10]
    total, logs = objective.discriminator_loss(clips(), clips() * 0.5, step=5, discriminator=judge)
    total.backward()
    assert judge.fc.weight.grad.abs().max() > 0
    expected = 0.1 * torch.stack([logs["logits_real"], logs["logits_fake"]])
    torch.testing.assert_close(judge.running, expected)
    with pytest.raises(UserError, match=r"\(T, H, W\) = \(8, 16, 16\)"):
        judge(clips(frames=4))


def test_noisy_labels_stay_within_their_bounds():
    real, fake = torch.full((5000, 1), 30.0), torch.full((5000, 1), -30.0)
    clean, noisy = (smoothed_logistic_discriminator(real, fake, noise) for noise in (0.0, 100.0))
    assert clean < 1e-6
    # Nearly all labels are at the bounds 0.7 and 0.3, each 0.3 * 30 away.
    assert noisy.item() == pytest.approx(18, rel=0.01)


def test_lecam_punishes_only_logits_apart_from_the_running_means():
    logits = torch.zeros(4, 1)
    assert lecam(logits + 1, logits - 1, torch.tensor([-2.0, 2.0])) == 0
    assert lecam(logits + 1, logits - 1, torch.tensor([1.0, -1.0])) == 8


def test_bad_loss_options():
    with pytest.raises(UserError, match="lecam_decay"):
        loss(lecam_decay=1.0)


def test_discriminator_out_of_a_trainer_file(tmp_path):
    judge = discriminator()
    state = {f"discriminator.{name}": value for name, value in to_published(judge.state_dict()).items()}
    torch.save({"loss": {"name": "larp", "sd": state | {"lecam.ema": torch.zeros(1)}}}, tmp_path / "last.pth")
    other = discriminator()
    torch.nn.init.zeros_(other.fc.weight)
    load_larp_discriminator(other, tmp_path / "last.pth")
    assert torch.equal(other.fc.weight, judge.fc.weight)
