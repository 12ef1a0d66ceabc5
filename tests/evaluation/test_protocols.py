"""Every configuration named after a protocol can be used, cites its source and stands in the docs."""

import pytest

from tests.evaluation.helpers import compose_config
from tests.paths import CONFIGS, ROOT
from vgen.evaluation.job import load_settings

NAMES = sorted(path.stem for path in (CONFIGS / "evaluation").glob("*.yaml"))
PROTOCOLS = [name for name in NAMES if name not in ("default", "fid", "cifar10")]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_is_complete(name):
    settings = load_settings(compose_config(f"evaluation={name}"))
    protocol = settings.protocol
    assert protocol is not None
    assert protocol.name == name
    assert protocol.source
    assert protocol.num_samples
    assert (protocol.clip_frames is None) == (settings.clips is None)
    if settings.clips is not None:
        assert settings.clips.frames == protocol.clip_frames
        assert settings.clips.size == protocol.image_size
        assert protocol.num_reference in (None, settings.clips.count)
    assert f"`{name}`" in (ROOT / "docs" / "evaluation.md").read_text()
    assert protocol.describe()["name"] == name


def test_there_are_some():
    assert {"imagenet256_adm_50k", "ucf101_fvd_2048x16"} <= set(PROTOCOLS)
