import pytest
import torch
from PIL import Image

from tests.checkpoints.helpers import RANDAR, tiny_release
from vgen.checkpoints.release import load_pipeline, load_tokenizer
from vgen.errors import UserError
from vgen.sampling.given import Edit
from vgen.sampling.settings import Sampling

CPU = torch.device("cpu")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.effect_noise((30, 20), 90).convert("RGB").save(path)
    return str(path)


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(tiny_release(tmp_path))


def test_a_cell_is_kept_only_as_a_whole(picture, tokenizer):
    outside = Edit(picture, [2, 2, 5, 8]).given(tokenizer).known.view(4, 4)
    assert outside.tolist() == [[True] * 4, [True, False, False, False], [True, False, False, False], [True] * 4]
    inside = Edit(picture, [2, 2, 5, 8], keep="inside").given(tokenizer).known.view(4, 4)
    assert inside.tolist() == [[False] * 4, [False, True, True, True], [False] * 4, [False] * 4]


@pytest.mark.parametrize("order", [None, RANDAR], ids=["raster", "randar"])
def test_kept_tokens_stay_in_every_sample(picture, tmp_path, order):
    folder = tiny_release(tmp_path, generator={"position_queries": bool(order)}, schedule=order)
    edit = Edit(picture, [0, 0, 4, 8])
    pipeline = load_pipeline(folder, device=CPU, edit=edit)
    given = edit.given(pipeline.tokenizer)
    ids = pipeline.generate_ids(torch.tensor([0, 1, 2]), torch.arange(3), Sampling())
    assert torch.equal(ids[:, given.known], given.ids[given.known].expand(3, -1))
    assert not torch.equal(ids[0], ids[1])
    if order:
        assert pipeline.plan.num_known == given.count == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box": [0, 0, 9, 4]}, "does not lie in the 8x8 picture"),
        ({"box": [4, 0, 4, 4]}, "does not lie"),
        ({"box": [0, 0, 4]}, "top, left, bottom, right"),
        ({"box": [0, 0, 8, 8]}, "keeps nothing"),
        ({"box": [0, 0, 8, 8], "keep": "inside"}, "keeps everything"),
        ({"box": [0, 0, 4, 4], "keep": "around"}, "keep=around"),
        ({"box": [0, 0, 4, 4], "image": "missing.png"}, "missing.png cannot be read"),
    ],
)
def test_bad_edits_are_refused(picture, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        Edit(**{"image": picture, **options}).given(tokenizer)
