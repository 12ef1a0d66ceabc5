import pytest
import torch

from tests.training.helpers import TOKENIZER, run


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """Each test is a process of its own as far as run folders and threads are concerned."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "VGEN_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer_release(tmp_path_factory):
    """A released tokenizer of 2x2 tokens, hardly trained."""
    return run(tmp_path_factory.mktemp("tokenizer") / "run", *TOKENIZER, "trainer.max_steps=2").release
