"""Which clips count as a digit in steady motion."""

import torch

from benchmarks.motion import centres, moves_steadily
from benchmarks.video_proxy import all_clips, open_clips, other_clips

SPEED = (2.0, 5.0)


def real_clips(count=40):
    source, _ = open_clips([])
    return all_clips(other_clips(source.val, count, first_key=5))


def test_the_centre_of_mass():
    clip = torch.zeros(1, 3, 2, 8, 10, dtype=torch.uint8)
    clip[:, :, 0, 2:4, 6:8] = 200
    clip[:, :, 0, 7, 0] = 20  # background noise has no mass
    assert torch.allclose(centres(clip)[0], torch.tensor([[2.5, 6.5], [3.5, 4.5]]))


def test_real_clips_move_steadily():
    clips = real_clips()
    assert moves_steadily(clips, speed=SPEED).all()
    noisy = (clips + torch.randn(clips.shape) * 20).clamp(0, 255).to(torch.uint8)
    assert moves_steadily(noisy, speed=SPEED).all()


def test_what_does_not():
    clips = real_clips()
    frozen = clips[:, :, :1].expand_as(clips)
    assert not moves_steadily(frozen, speed=SPEED).any()
    shuffled = clips[:, :, torch.randperm(17, generator=torch.Generator().manual_seed(0))]
    assert not moves_steadily(shuffled, speed=SPEED).any()
    cut = torch.cat([clips[:, :, :8], clips.roll(1, 0)[:, :, 8:]], 2)
    assert moves_steadily(cut, speed=SPEED).float().mean() < 0.1
    vanished = clips.clone()
    vanished[:, :, 9] = 0
    assert not moves_steadily(vanished, speed=SPEED).any()
    half_speed = clips[:, :, :9].repeat_interleave(2, 2)[:, :, :17]
    assert moves_steadily(half_speed, speed=SPEED).float().mean() < 0.1
