import pytest
import torch
import yaml

from tests.paths import CONFIGS
from vgen.errors import UserError
from vgen.losses.video_adversarial import PatchGAN3d
from vgen.tokenizers.causal3d import Causal3D, token_frames
from vgen.tokenizers.causal3d_net import Memory
from vgen.tokenizers.fsq import FSQ
from vgen.tokenizers.quantize import VectorQuantizer


def vq():
    return VectorQuantizer(codebook_size=64, codebook_dim=4, usage_window=128)


def fsq():
    return FSQ(levels=[5, 5, 3])


def small(quantizer=None, **changes):
    options = yaml.safe_load((CONFIGS / "tokenizer" / "causal3d.yaml").read_text())
    del options["_target_"]
    options |= {"image_size": 16, "num_frames": 9, "base_channels": 8, "multipliers": [1, 2, 2], "z_channels": 8}
    options |= {"time_strides": [2, 2], "space_strides": [2, 1], "num_res_blocks": 1, "norm_groups": 4}
    torch.manual_seed(0)
    return Causal3D(**options | {"quantizer": quantizer or vq()} | changes)


def clips(batch=2, frames=9, height=16, width=16, seed=1):
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(params=[vq, fsq], ids=["vq", "fsq"])
def tokenizer(request):
    return small(request.param()).eval()


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (5, 16, 24), (9, 8, 16), (13, 16, 16)])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_shape_rule(frames, height, width, patch_size):
    network = small(patch_size=patch_size).eval()
    stride = 2 * patch_size
    assert network.grid == (3, 16 // stride, 16 // stride)
    pixels = clips(frames=frames, height=height, width=width)
    grid = (1 + (frames - 1) // 4, height // stride, width // stride)
    assert network.latents(pixels).shape == (2, 4, *grid)
    ids = network.encode(pixels)
    assert ids.shape == (2, grid[0] * grid[1] * grid[2])
    assert network.decode(ids, grid).shape == pixels.shape


@pytest.mark.parametrize("time_padding", ["first", "zeros"])
@pytest.mark.parametrize("changed", [1, 4, 5, 8])
def test_a_future_frame_never_changes_a_past_latent(time_padding, changed):
    network = small(time_padding=time_padding, patch_size=2).eval()
    pixels = clips()
    other = pixels.clone()
    other[:, :, changed:] = clips(seed=2)[:, :, changed:]
    before, after = network.latents(pixels), network.latents(other)
    group = 1 + (changed - 1) // 4
    assert torch.equal(before[:, :, :group], after[:, :, :group])
    assert not torch.equal(before[:, :, group], after[:, :, group])


def test_a_future_latent_never_changes_a_past_frame(tokenizer):
    latents = torch.randn(1, tokenizer.codebook.shape[1], 3, 8, 8)
    other = latents.clone()
    other[:, :, 2] += 1
    before, after = tokenizer.decode_latents(latents), tokenizer.decode_latents(other)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    for frame in range(5, 9):
        assert not torch.equal(before[:, :, frame], after[:, :, frame])


def test_a_picture_is_a_clip_of_one_frame(tokenizer):
    pixels = clips()
    picture = pixels[:, :, 0]
    assert torch.equal(tokenizer.latents(picture), tokenizer.latents(pixels)[:, :, :1])
    ids = tokenizer.encode(picture)
    assert torch.equal(ids, tokenizer.encode(pixels[:, :, :1]))
    assert torch.equal(ids, tokenizer.encode(pixels)[:, :64])
    assert tokenizer.decode(ids, (1, 8, 8)).shape == (2, 3, 1, 16, 16)
    output = tokenizer(picture)
    assert output.reconstruction.shape == picture.shape
    torch.testing.assert_close(output.reconstruction, tokenizer.decode(ids, (1, 8, 8))[:, :, 0])


@pytest.mark.parametrize("pieces", [(1, 4, 4), (5, 4), (1, 8)])
def test_streaming_equals_the_whole_clip(tokenizer, pieces):
    pixels = clips()
    ids, memory = tokenizer.encode(pixels), Memory()
    streamed = [tokenizer.encode(part, memory=memory) for part in pixels.split(pieces, 2)]
    assert torch.equal(torch.cat(streamed, 1), ids)
    whole, memory = tokenizer.decode(ids), Memory()
    decoded = [tokenizer.decode(part, (part.shape[1] // 64, 8, 8), memory) for part in streamed]
    assert [part.shape[2] for part in decoded] == list(pieces)
    torch.testing.assert_close(torch.cat(decoded, 2), whole)
    with pytest.raises(UserError, match="need a multiple of 4 frames, got 3"):
        tokenizer.encode(pixels[:, :, :3], memory=_used(tokenizer, pixels))


def _used(tokenizer, pixels):
    memory = Memory()
    tokenizer.encode(pixels[:, :, :1], memory=memory)
    return memory


def test_encode_decode_agree_with_forward(tokenizer):
    pixels = clips()
    output = tokenizer(pixels)
    assert torch.equal(output.ids, tokenizer.encode(pixels))
    torch.testing.assert_close(output.reconstruction, tokenizer.decode(output.ids), atol=1e-5, rtol=1e-5)
    assert tokenizer.codebook_size == len(tokenizer.codebook)
    assert int(output.ids.max()) < tokenizer.codebook_size
    assert tokenizer.statistics(output.ids)["perplexity"] >= 1


@pytest.mark.parametrize("frames", [9, 1])
def test_gradients_reach_everything_for_clips_and_pictures(tokenizer, frames):
    tokenizer.train()
    output = tokenizer(clips(frames=frames))
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for flag in (False, True):
        network = small(fsq(), gradient_checkpointing=flag).train()
        network(clips()).reconstruction.square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_bfloat16_autocast_keeps_ids_in_range(tokenizer):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tokenizer.train()(clips())
    assert output.reconstruction.dtype == torch.float32
    assert output.reconstruction.isfinite().all()


def test_lengths_that_do_not_divide_name_the_nearest():
    assert [token_frames(n, 4) for n in (1, 5, 17)] == [1, 2, 5]
    with pytest.raises(UserError, match="the nearest lengths are 13 and 17"):
        token_frames(16, 4)
    with pytest.raises(UserError, match="the nearest lengths are 5 and 9"):
        small().encode(clips(frames=8))
    with pytest.raises(UserError, match="16 frames"):
        small(num_frames=16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 15}, "multiple of the stride 2"),
        ({"time_strides": [2]}, r"time_strides=\[2\]"),
        ({"space_strides": [3, 1]}, r"space_strides=\[3, 1\]"),
        ({"multipliers": []}, "multipliers must list"),
        ({"time_padding": "mirror"}, "time_padding=mirror is unknown"),
        ({"patch_size": 0}, "patch_size=0"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(UserError, match=message):
        small(**changes)


def test_bad_input(tokenizer):
    with pytest.raises(UserError, match=r"takes \[B, 3, T, H, W\]"):
        tokenizer.encode(torch.zeros(1, 4, 1, 16, 16))
    with pytest.raises(UserError, match="do not divide by the stride 2"):
        tokenizer.encode(torch.zeros(1, 3, 1, 15, 16))
    with pytest.raises(UserError, match="pass grid="):
        tokenizer.decode(torch.zeros(1, 7, dtype=torch.long))


def test_patchgan3d_judges_clips_and_single_frames():
    judge = PatchGAN3d(base_channels=4, num_layers=2, time_layers=1)
    for frames in (1, 9):
        logits = judge(torch.zeros(2, 3, frames, 16, 16))
        assert logits.shape[:2] == (2, 1)
    with pytest.raises(UserError, match="H and W at least 12"):
        judge(torch.zeros(2, 3, 9, 8, 8))
    with pytest.raises(UserError, match="time_layers below num_layers"):
        PatchGAN3d(num_layers=2, time_layers=2)
