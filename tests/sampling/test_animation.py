import pytest
import torch
from PIL import Image

from tests.checkpoints.helpers import RANDAR, tiny_release
from vgen.checkpoints.release import load_pipeline
from vgen.errors import UserError
from vgen.sampling.animation import animate
from vgen.sampling.settings import Sampling

ZIPAR = {"_target_": "vgen.schedules.zipar.zipar", "_partial_": True, "window": 1, "adaptive": True}


@pytest.mark.parametrize("schedule", [None, ZIPAR, RANDAR], ids=["raster", "adaptive", "randar"])
def test_a_frame_per_pass(tmp_path, schedule):
    queries = schedule is RANDAR
    folder = tiny_release(tmp_path, generator={"position_queries": queries}, schedule=RANDAR if queries else None)
    pipeline = load_pipeline(folder, device=torch.device("cpu"), schedule=schedule)
    passes = []
    index = torch.arange(4)
    pipeline.generate_ids(index % 3, index, Sampling(), watch=lambda number, _: passes.append(number))
    path = animate(pipeline, index % 3, index, Sampling(), tmp_path / "decode.gif")
    with Image.open(path) as animation:
        assert animation.n_frames == len(passes)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    pipeline = load_pipeline(tiny_release(tmp_path), device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"decode\.gif cannot be written"):
        animate(pipeline, torch.tensor([0]), torch.arange(1), Sampling(), tmp_path / "no" / "decode.gif")
