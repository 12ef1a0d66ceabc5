import copy
import random

import pytest
import torch

from vgen.data.arrays import ArrayImages
from vgen.data.loader import build_loader
from vgen.errors import UserError


def images(count=23, *, flip=True, shift=1, seed=5):
    pictures = torch.randint(0, 256, (count, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ArrayImages(pictures=pictures, labels=torch.arange(count) % 4, flip=flip, shift=shift, seed=seed)


def loader(dataset=None, **options):
    defaults = {"batch_size": 4, "seed": 1, "shuffle": True, "drop_last": True}
    return build_loader(dataset or images(), **(defaults | options))


def joined(batches):
    batches = list(batches)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def same(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


def test_contract_of_a_batch():
    batch = next(iter(loader()))
    assert set(batch) == {"pixels", "label", "index"}
    assert batch["pixels"].shape == (4, 3, 6, 6)
    assert batch["pixels"].dtype == torch.float32
    assert batch["pixels"].min() >= -1
    assert batch["pixels"].max() <= 1
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    assert torch.equal(batch["label"], batch["index"] % 4)


def test_pixels_do_not_depend_on_batch_size_or_workers():
    reference = joined(loader(batch_size=5))
    assert not torch.equal(reference["index"], torch.arange(20))
    for options in ({"batch_size": 1}, {"batch_size": 10}, {"batch_size": 5, "num_workers": 2}):
        other = joined(loader(**options))
        assert all(torch.equal(reference[key], other[key][:20]) for key in reference)


def test_augmentation_differs_between_epochs_and_seeds():
    dataset = images(1, shift=2)
    stream = loader(dataset, batch_size=1)
    seen = {next(iter(stream))["pixels"].numpy().tobytes() for _ in range(12)}
    assert len(seen) > 3
    draws = [(0, draw) for draw in range(12)]
    assert not torch.equal(dataset.__getitems__(draws)["pixels"], images(1, seed=6).__getitems__(draws)["pixels"])


def test_flip_is_a_mirror_half_of_the_time():
    dataset = images(1, shift=0)
    batch = dataset.__getitems__([(0, draw) for draw in range(400)])["pixels"]
    plain = dataset[0]["pixels"]
    mirrored = (batch == plain.flip(-1)).flatten(1).all(1)
    assert torch.equal(~mirrored, (batch == plain).flatten(1).all(1))
    assert 160 < mirrored.sum() < 240


def test_shift_moves_the_picture_and_fills_with_black():
    picture = torch.zeros(1, 1, 6, 6, dtype=torch.uint8)
    picture[0, 0, 0, 0] = 255
    dataset = ArrayImages(pictures=picture, labels=torch.zeros(1, dtype=torch.int64), shift=1)
    batch = dataset.__getitems__([(0, draw) for draw in range(200)])["pixels"]
    places = {tuple(place) for place in (batch[:, 0] == 1).nonzero()[:, 1:].tolist()}
    assert places == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert batch.shape == (200, 3, 6, 6)
    assert set(batch.unique().tolist()) == {-1.0, 1.0}


def test_every_epoch_is_a_new_permutation():
    stream = loader(batch_size=23)
    first, second = next(iter(stream))["index"], next(iter(stream))["index"]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(23))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 3, 5, 7, 10])
def test_resume_continues_at_the_next_batch(workers, stop):
    whole = loader(num_workers=workers)
    expected = [batch for _ in range(4) for batch in whole]
    interrupted = loader(num_workers=workers)
    served = 0
    while served < stop:
        for _ in interrupted:
            served += 1
            if served == stop:
                break
    state = copy.deepcopy(interrupted.state_dict())
    resumed = loader(num_workers=workers)
    resumed.load_state_dict(state)
    rest = list(resumed)
    # The first pass serves what is left of the interrupted epoch only.
    assert len(rest) == 5 - stop % 5
    rest += list(resumed)
    assert same(rest, expected[stop : stop + len(rest)])


def test_state_taken_while_a_batch_is_in_use_does_not_serve_it_again():
    stream = loader()
    states = [stream.state_dict()["samples"] for _ in stream]
    assert states == [4, 8, 12, 16, 20]


def test_leaving_an_epoch_early_continues_the_stream():
    expected = [batch for stream in [loader()] for _ in range(2) for batch in stream]
    stream = loader()
    pieces = [batch for _ in range(3) for _, batch in zip(range(3), iter(stream), strict=False)]
    assert same(pieces, expected[:9])


def test_sequential_loader_starts_over():
    stream = loader(shuffle=False, drop_last=False)
    next(iter(stream))
    assert torch.equal(joined(stream)["index"], torch.arange(23))
    assert torch.equal(joined(stream)["index"], torch.arange(23))


def test_resume_with_another_batch_size():
    stream = loader(batch_size=4)
    list(zip(range(2), stream, strict=False))
    other = loader(batch_size=2)
    other.load_state_dict(stream.state_dict())
    assert torch.equal(joined(other)["index"], joined(loader(batch_size=2))["index"][8:])


def test_state_of_other_data_is_refused():
    state = loader().state_dict()
    with pytest.raises(UserError, match="23 images but the data set has 24"):
        loader(images(24)).load_state_dict(state)
    with pytest.raises(UserError, match="seed 1, not 2"):
        loader(seed=2).load_state_dict(state)


def test_global_random_state_is_untouched():
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    list(loader(num_workers=2))
    list(loader())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize(("count", "ranks", "batch"), [(23, 2, 4), (25, 4, 3), (24, 2, 4), (17, 2, 8), (9, 4, 2)])
def test_ranks_partition_the_epoch(count, ranks, batch):
    shares = [
        list(loader(images(count), batch_size=batch, rank=rank, world_size=ranks, drop_last=False))
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    assert all(1 <= len(b["index"]) <= batch for share in shares for b in share)
    assert sorted(i for share in shares for b in share for i in b["index"].tolist()) == list(range(count))


def test_global_batch_does_not_depend_on_the_number_of_ranks():
    single = list(loader(batch_size=8))
    shares = [list(loader(batch_size=4, rank=rank, world_size=2)) for rank in range(2)]
    for number, batch in enumerate(single):
        for key in batch:
            assert torch.equal(batch[key], torch.stack([share[number][key] for share in shares], 1).flatten(0, 1))


def test_drop_last():
    assert [len(batch["index"]) for batch in loader(drop_last=True)] == [4] * 5
    assert [len(batch["index"]) for batch in loader(drop_last=False)] == [4] * 5 + [3]
    assert len(loader(drop_last=True)) == 5
    assert len(loader(drop_last=False)) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 24}, "fewer than one batch"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"batch_size": 1, "world_size": 2, "drop_last": False}, "cannot be shared evenly"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        loader(**options)


class Failing:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {}

    def __getitems__(self, draws):
        raise UserError("a.png is too small; enlarge it")


@pytest.mark.parametrize("workers", [0, 1])
def test_user_errors_of_workers_stay_one_line(workers):
    with pytest.raises(UserError) as error:
        list(loader(Failing(), num_workers=workers))
    assert str(error.value) == "a.png is too small; enlarge it"
