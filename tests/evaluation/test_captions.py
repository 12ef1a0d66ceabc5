import json

import pytest
import torch

from tests.evaluation.helpers import save_npz
from vgen.errors import UserError
from vgen.evaluation.captions import mean_clip_score, read_captions
from vgen.evaluation.readers import open_pictures
from vgen.processes import Processes


def test_text_and_json(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\ntwo dogs, one line\n")
    (tmp_path / "a.json").write_text(json.dumps(["a cat", "two dogs, one line"]))
    expected = ["a cat", "two dogs, one line"]
    assert read_captions(tmp_path / "a.txt", 2) == read_captions(tmp_path / "a.json", 2) == expected


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [("a\nb\n", 3, "holds 2 captions for 3 samples"), ("a\n\n", 2, "none of them empty"), (None, 1, "cannot be read")],
)
def test_bad_captions_are_refused(tmp_path, text, count, message):
    if text is not None:
        (tmp_path / "c.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path / "c.txt", count)


def test_the_score_is_the_mean_over_pairs(tmp_path):
    pictures = open_pictures(save_npz(tmp_path / "a.npz", 7, seed=0), key="samples")

    def scorer(batch, captions):
        return batch.double().mean((1, 2, 3)) / 255 + torch.tensor([float(c) for c in captions], dtype=torch.float64)

    value = mean_clip_score(pictures, [str(i) for i in range(7)], scorer, batch_size=2, processes=Processes())
    assert value == pytest.approx(float(pictures.read(range(7)).double().mean()) / 255 + 3)
