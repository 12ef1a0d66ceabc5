import hashlib
from dataclasses import replace

import pytest

from vgen.errors import UserError
from vgen.evaluation.weights import I3D_KINETICS, I3D_TORCHSCRIPT, INCEPTION, find


@pytest.fixture(autouse=True)
def _nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("VGEN_WEIGHTS", raising=False)


def write(folder, name, content=b"x"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def known(content):
    return replace(INCEPTION, sha256=hashlib.sha256(content).hexdigest()[:8])


def test_a_missing_file_is_named_with_every_place_and_its_hash(tmp_path):
    with pytest.raises(UserError) as caught:
        find(INCEPTION, None)
    message = str(caught.value)
    for name in ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"):
        assert str(tmp_path / "torch" / "hub" / "checkpoints" / name) in message
    assert "SHA-256 starts with 6726825d" in message
    assert "VGEN_WEIGHTS" in message


def test_the_three_places_in_their_order(tmp_path, monkeypatch):
    file, name = known(b"x"), INCEPTION.names[0]
    cache = write(tmp_path / "torch" / "hub" / "checkpoints", name)
    assert find(file, None).path == cache
    variable = write(tmp_path / "b", INCEPTION.names[1])
    monkeypatch.setenv("VGEN_WEIGHTS", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    assert find(file, None).path == variable
    given = write(tmp_path / "c", "mine.pth")
    assert find(file, str(given)).path == given
    assert find(file, str(given)).verified
    write(tmp_path / "c", name)
    assert find(file, str(tmp_path / "c")).path == tmp_path / "c" / name
    with pytest.raises(UserError, match=r"tried: .*gone\.pth\)"):
        find(file, str(tmp_path / "gone.pth"))


def test_another_file_is_refused_unless_allowed(tmp_path):
    path = write(tmp_path, INCEPTION.names[0], b"other")
    with pytest.raises(UserError, match=r"expected SHA-256 starts with 6726825d.*allow_unverified"):
        find(INCEPTION, str(path))
    assert not find(INCEPTION, str(path), allow_unverified=True).verified
    wrong = write(tmp_path, "inception_v3_google-0cc3c7bd.pth")
    with pytest.raises(UserError, match="torchvision's Inception"):
        find(INCEPTION, str(wrong), allow_unverified=True)


def test_a_git_blob_and_a_file_without_known_hash(tmp_path):
    path = write(tmp_path, I3D_KINETICS.names[0], b"hello\n")
    blob = replace(I3D_KINETICS, git_blob="ce013625030ba8dba906f756967f9e9ca394464a")  # git hash-object of the same
    assert find(blob, str(path)).verified
    with pytest.raises(UserError, match="expected git blob a867b87"):
        find(I3D_KINETICS, str(path))
    script = write(tmp_path, I3D_TORCHSCRIPT.names[0])
    assert find(I3D_TORCHSCRIPT, str(script)).verified is False
