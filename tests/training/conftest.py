import pytest
import torch

from tests.evaluation.helpers import TinyExtractor, save_script
from tests.training.helpers import GENERATOR, NO_DROPOUT, TOKENIZER, launch, run, score_of, two_processes


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


@pytest.fixture(scope="session")
def extractor_file(tmp_path_factory):
    return save_script(TinyExtractor(), tmp_path_factory.mktemp("extractor") / "tiny.pt")


@pytest.fixture(scope="session")
def scored_by_two(tokenizer_release, extractor_file, tmp_path_factory):
    """Settings of a generator on cached codes that is scored every two of six steps, and its run by two processes."""
    settings = [
        *GENERATOR,
        *NO_DROPOUT,
        # 7 samples and 41 reference pictures: the first process has one more of each
        *score_of(extractor_file, 7, "score.every_steps=2"),
        f"task.tokenizer={tokenizer_release}",
        "task.cache_codes=true",
        "task.cache_augmentation=none",
        "task.optimizer.lr=1e-4",
        "every.validate=2",
        "trainer.max_steps=6",
    ]
    folder = tmp_path_factory.mktemp("two") / "run"
    return settings, launch(folder, *settings, *two_processes(16), torchrun=True)
