import pytest
import torch
from torch import nn

from vgen.checkpoints.convert import difference, load_strict, read_weights, rename, unwrap
from vgen.errors import UserError


class Payload:
    """Anything that only pickle could restore."""


def test_nested_and_flat_published_files_are_unwrapped(tmp_path):
    state = {"a": torch.ones(2)}
    assert unwrap({"model": state, "args": 3}, keys=("model",), path="f") == state
    assert unwrap(state, keys=("model",), path="f") == state
    with pytest.raises(UserError, match="no state dict"):
        unwrap({"steps": 3}, keys=("model",), path="f")


def test_files_with_code_inside_are_refused(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"model": Payload()}, path)
    with pytest.raises(UserError, match="not a plain weight file"):
        read_weights(path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + b"\0" * 50])
def test_damaged_files_are_one_clear_error(tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="copy it again"):
        read_weights(path)
    with pytest.raises(UserError, match="no weight file"):
        read_weights(tmp_path / "absent.pt")


def test_first_matching_prefix_counts():
    state = {"cap.fc.weight": torch.ones(1), "caption": torch.zeros(1), "other": torch.zeros(1)}
    assert list(rename(state, {"cap.": "x.", "cap": "y."})) == ["x.fc.weight", "y.tion", "other"]


def test_strict_loading_lists_all_three_kinds_of_difference():
    module = nn.Linear(2, 3)
    with pytest.raises(
        UserError, match=r"missing: bias.*unknown: extra.*another shape: weight \[9\] instead of \[3, 2\]"
    ):
        load_strict(module, {"weight": torch.ones(9), "extra": torch.ones(1)}, what="file")
    assert difference({"a": (1,)}, {"a": (1,)}) == ""
