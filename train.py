"""Train a tokenizer or a generator: ``python train.py experiment=<name> [key=value ...]``; see ``--help``."""

import sys

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    """Run one training; a user's mistake ends with one line and status 2."""
    from vgen.errors import UserError
    from vgen.runtime import rank
    from vgen.training.callbacks import Interrupted
    from vgen.training.run import train

    try:
        train(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        if rank() == 0:
            print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
