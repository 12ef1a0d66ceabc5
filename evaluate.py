"""Score samples or reconstructions: ``python evaluate.py --help``."""

import hydra
from omegaconf import DictConfig

from vgen.errors import reported


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(config: DictConfig) -> None:
    """Run one evaluation; a mistake of the user ends with one line and status 2."""
    from vgen.evaluation.job import evaluate

    with reported():
        evaluate(config)


if __name__ == "__main__":
    main()
