import pytest
import torch

from vgen.data.frame_prediction import cache_conditioned_codes
from vgen.data.moving_digits import moving_digits
from vgen.data.video_transforms import first_frames
from vgen.errors import UserError
from vgen.tokenizers.causal3d import Causal3D
from vgen.tokenizers.fsq import FSQ

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source():
    return moving_digits(
        image_size=8,
        num_frames=5,
        digit_size=5,
        num_digits=1,
        min_speed=1.0,
        max_speed=2.0,
        train_clips=12,
        val_clips=10,
        fresh=True,
        val_fraction=0.165,
        seed=0,
    )


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    tokenizer = Causal3D(
        image_size=8,
        num_frames=5,
        patch_size=2,
        base_channels=4,
        multipliers=[1, 1],
        time_strides=[2],
        space_strides=[2],
        num_res_blocks=1,
        z_channels=4,
        quantizer=FSQ(levels=[5, 5, 3]),
        norm_groups=2,
        time_padding="first",
        gradient_checkpointing=False,
    ).eval()
    # Latents far apart, so that different frames have different codes.
    tokenizer.quant_conv.weight.data.mul_(100.0)
    return tokenizer


def cached(source, tokenizer, folder, given_frames, augmentation="flip"):
    options = {"augmentation": augmentation, "batch_size": 4, "device": CPU, "seed": 3}
    return cache_conditioned_codes(source, tokenizer, folder, given_frames=given_frames, **options)


def test_a_clip_comes_with_the_codes_of_its_own_first_frames_in_the_same_augmentation(source, tokenizer, tmp_path):
    codes = cached(source, tokenizer, tmp_path / "codes", 2)
    assert len(codes.train) == 12
    draws = [(index, draw) for draw, index in enumerate([3, 7, 7, 0, 11, 5])]
    batch = codes.train.__getitems__(draws)
    mirrored = 0
    for place, (index, _) in enumerate(draws):
        clip = source.train.picture(index).float()[None] / 127.5 - 1
        plain, flipped = tokenizer.encode(clip)[0], tokenizer.encode(clip.flip(-1))[0]
        is_mirrored = not torch.equal(batch["ids"][place], plain)
        assert torch.equal(batch["ids"][place], flipped if is_mirrored else plain)
        shown = clip.flip(-1) if is_mirrored else clip
        assert torch.equal(batch["condition"][place], tokenizer.encode(first_frames(shown, 2))[0])
        mirrored += is_mirrored
    assert 0 < mirrored < len(draws)
    assert not torch.equal(batch["condition"], batch["ids"])
    one = codes.val[4]
    assert one["condition"].shape == one["ids"].shape


def test_other_numbers_of_first_frames_are_kept_apart(source, tokenizer, tmp_path):
    one, two = (cached(source, tokenizer, tmp_path / "codes", given, "none") for given in (1, 3))
    assert not torch.equal(one.train[0]["condition"], two.train[0]["condition"])
    assert torch.equal(one.train[0]["ids"], two.train[0]["ids"])


@pytest.mark.parametrize("given", [0, 5])
def test_impossible_numbers_of_frames_are_named(source, tokenizer, tmp_path, given):
    with pytest.raises(UserError, match=rf"given_frames={given} must lie in 1\.\.4"):
        cached(source, tokenizer, tmp_path / "codes", given)
