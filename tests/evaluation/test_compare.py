import json
import sys

import pytest

from vgen.errors import UserError
from vgen.evaluation.__main__ import main
from vgen.evaluation.compare import compare
from vgen.evaluation.report import SCHEMA


def write(path, **changes):
    document = {
        "schema": SCHEMA,
        "job": "samples",
        "metrics": {"fid": 3.0, "is": 100.0},
        "n_samples": 50000,
        "n_reference": 10,
        "extractor": {"sha256": "6726825d"},
        "estimator": {"dialect": "adm"},
        "dataset": {"reference": "a.npz", "resolution": [256, 256]},
    }
    path.write_text(json.dumps(document | changes))
    return path


def test_equal_protocols_are_compared(tmp_path, monkeypatch, capsys):
    a, b = write(tmp_path / "a.json"), write(tmp_path / "b.json", metrics={"fid": 2.5, "kid": 1.0})
    assert compare(a, b) == {"fid": (3.0, 2.5)}
    monkeypatch.setattr(sys, "argv", ["x", "compare", str(a), str(b)])
    main()
    assert capsys.readouterr().out.split() == ["fid", "3", "2.5", "-0.5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_samples": 10000}, "number of samples: 50000 and 10000"),
        ({"estimator": {"dialect": "torch-fidelity"}}, "dialect: adm and torch-fidelity"),
        ({"extractor": {"sha256": "00"}}, "extractor: 6726825d and 00"),
        ({"protocol": {"name": "x"}}, "protocol: None and x"),
        ({"metrics": {"kid": 1.0}}, "share no metric"),
    ],
)
def test_unequal_ones_are_refused(tmp_path, changes, message, monkeypatch, capsys):
    a, b = write(tmp_path / "a.json"), write(tmp_path / "b.json", **changes)
    with pytest.raises(UserError, match=message):
        compare(a, b)
    monkeypatch.setattr(sys, "argv", ["x", "compare", str(a), str(b)])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err
