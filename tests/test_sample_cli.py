import json
import subprocess
import sys

import numpy as np
from PIL import Image

from tests.checkpoints.helpers import tiny_release
from tests.paths import ROOT


def sample(*arguments, launcher=()):
    words = [sys.executable, *launcher, str(ROOT / "sample.py"), *arguments]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_two_processes_write_the_same_file_as_one(command, tmp_path):
    release = tiny_release(tmp_path)
    common = [f"checkpoint={release}", "num_samples=9", "batch_size=2", "device=cpu", "sampling.guidance.scale=2"]
    status, out, err = command("sample.py", *common, "animate=2", f"out={tmp_path / 'one'}")
    assert status == 0, err
    assert "samples.npz" in out
    assert "img/s" in err
    assert (tmp_path / "one" / "decode.gif").is_file()
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    two = sample(*common, f"out={tmp_path / 'two'}", launcher=torchrun)
    assert two.returncode == 0, two.stderr
    first, second = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("one", "two"))
    assert np.array_equal(first, second)


def test_a_part_of_a_picture_is_kept(command, tmp_path):
    Image.effect_noise((8, 8), 90).convert("RGB").save(tmp_path / "picture.png")
    release = tiny_release(tmp_path)
    edit = ["edit=picture", f"edit.image={tmp_path / 'picture.png'}", "edit.box=[0,0,4,8]"]
    words = [f"checkpoint={release}", "num_samples=3", "device=cpu", f"out={tmp_path / 'out'}", *edit]
    status, _, err = command("sample.py", *words)
    assert status == 0, err
    pictures = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    assert pictures.shape == (3, 8, 8, 3)
    identity = json.loads((tmp_path / "out" / "samples.json").read_text())["identity"]
    assert identity["edit"]["box"] == [0, 0, 4, 8]


def test_where_pixels_are_decoded_is_no_part_of_what_samples_are(command, tmp_path):
    words = [f"checkpoint={tiny_release(tmp_path)}", "num_samples=3", "device=cpu", f"out={tmp_path / 'out'}"]
    for more, expected in (
        (["pixels.beside_tokens=false"], None),
        (["pixels.beside_tokens=true"], None),
        (["pixels.channels_last=true", "pixels.beside_tokens=false", f"out={tmp_path / 'other'}"], True),
    ):
        status, _, err = command("sample.py", *words, *more)
        assert status == 0, err
        folder = tmp_path / ("other" if expected else "out")
        pixels = json.loads((folder / "samples.json").read_text())["identity"].get("pixels")
        assert pixels == (expected and {"dtype": "float32", "channels_last": True, "compile": False})


def test_keys_and_values_of_one_byte(command, tmp_path):
    words = [f"checkpoint={tiny_release(tmp_path)}", "num_samples=3", "device=cpu", f"out={tmp_path / 'out'}"]
    status, _, err = command("sample.py", *words, "cache_dtype=float8_e4m3fn")
    assert status == 0, err
    identity = json.loads((tmp_path / "out" / "samples.json").read_text())["identity"]
    assert identity["cache_dtype"] == "float8_e4m3fn"
    status, _, err = command("sample.py", *words, "cache_dtype=float16")
    assert status == 2
    assert "cache_dtype=float16 is unknown; choose float8_e4m3fn or null" in err


def test_mistakes_end_with_one_line_and_status_2(tmp_path):
    run = sample(f"checkpoint={tmp_path}")
    assert run.returncode == 2
    assert run.stderr.strip().startswith("error: ")
    assert len(run.stderr.strip().splitlines()) == 1


def test_unknown_key_is_refused(command):
    status, _, err = command("sample.py", "checkpoint=x", "bogus=1")
    assert status == 1
    assert "bogus" in err
