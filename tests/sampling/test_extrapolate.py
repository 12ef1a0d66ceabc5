import pytest
import torch

from tests.checkpoints.helpers import RANDAR, tiny_release
from tests.generators.helpers import tiny_generator
from vgen.checkpoints.release import load_pipeline
from vgen.errors import UserError
from vgen.layers.rope import extrapolated_rope_table, rope_table
from vgen.sampling.decode import decode
from vgen.sampling.extrapolate import Extrapolation, spread
from vgen.sampling.settings import Guidance, Sampling, SpatialGuidance
from vgen.schedules.randar import randar

CPU = torch.device("cpu")


def test_tokens_are_spread_over_every_second_cell():
    ids, known = spread(torch.tensor([[1, 2, 3, 4]]), (2, 2), 2)
    assert ids.view(4, 4).tolist() == [[1, 0, 2, 0], [0] * 4, [3, 0, 4, 0], [0] * 4]
    assert torch.equal(known.view(4, 4), ids.view(4, 4) > 0)


def test_the_table_of_a_finer_grid_keeps_the_trained_range():
    fine, coarse = extrapolated_rope_table((4, 4), 16, factor=2, boundary=1), rope_table((4, 4), 16)
    assert fine.shape == (65, 8, 2)
    # The last cell of an axis lies where the last trained one did, but for the frequencies that count cells.
    torch.testing.assert_close(fine[63, 1:4], coarse[15, 1:4])
    assert not torch.allclose(fine[63, 0], coarse[15, 0])


@pytest.mark.parametrize("steps", [None, 9])
def test_pictures_of_twice_the_size_keep_their_coarse_tokens(tmp_path, steps):
    folder = tiny_release(tmp_path, generator={"position_queries": True}, schedule=RANDAR)
    pipeline = load_pipeline(folder, device=CPU, extrapolation=Extrapolation(steps=steps))
    labels, index, sampling = torch.tensor([0, 1]), torch.arange(2), Sampling(guidance=Guidance(scale=3.0))
    ids = pipeline.generate_ids(labels, index, sampling)
    coarse = decode(pipeline.coarse, pipeline.coarse_plan, labels, sampling=sampling, sample_index=index)
    assert torch.equal(ids.view(2, 8, 8)[:, ::2, ::2].flatten(1), coarse)
    assert pipeline.generate(labels, index, sampling).shape == (2, 3, 16, 16)
    alone = pipeline.generate_ids(labels[1:], index[1:], sampling)
    assert torch.equal(alone[0], ids[1])


def test_three_branches_combine_as_stated():
    plan = randar(grid=(2, 4), num_known=3)
    generator = tiny_generator(plan)
    known = torch.zeros(1, 8, dtype=torch.bool)
    known[:, :3] = True
    common = {
        "sample_index": torch.arange(1),
        "known_ids": torch.arange(8)[None],
        "known": known,
        "num_passes": 1,
    }

    def first_logits(label, sampling, **options):
        seen = []
        decode(
            generator,
            plan,
            torch.tensor([label]),
            sampling=sampling,
            trace=lambda _, logits: seen.append(logits),
            **common,
            **options,
        )
        return seen[0]

    conditional, null = first_logits(1, Sampling()), first_logits(5, Sampling())
    spatial = SpatialGuidance(scale=4.0, hidden=1.0)
    guided = first_logits(1, Sampling(guidance=Guidance(scale=3.0)), spatial=spatial)
    # With v = 1 the partial branch cancels; its own logits follow from two weights.
    share = 3 / 8
    weight = spatial.weight(share)
    partial = (guided - 3.0 * (conditional - null) - weight * null) / (1 - weight)
    with torch.no_grad():
        generator.tok_embeddings.weight.zero_()
    torch.testing.assert_close(partial, first_logits(5, Sampling()), atol=1e-4, rtol=1e-4)


def test_orders_without_queries_are_refused(tmp_path):
    with pytest.raises(UserError, match="such as randar"):
        load_pipeline(tiny_release(tmp_path), device=CPU, extrapolation=Extrapolation())


@pytest.mark.parametrize("options", [{"factor": 1}, {"boundary": -1}])
def test_bad_settings_are_refused(options):
    with pytest.raises(UserError, match="extrapolate"):
        Extrapolation(**options)
