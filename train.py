"""Train a tokenizer or a generator: ``python train.py experiment=<name> [key=value ...]``; see ``--help``."""

import sys

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    """Run one training; a user's mistake ends with one line and status 2."""
    from vgen.errors import reported
    from vgen.runtime import rank
    from vgen.training.callbacks import InterruptedTrainingError
    from vgen.training.run import train

    try:
        with reported():
            train(config)
    except InterruptedTrainingError as stop:
        if rank() == 0:
            print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
