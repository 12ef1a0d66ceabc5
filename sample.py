"""Draw samples from a trained generator: ``python sample.py --help``."""

import hydra
from omegaconf import DictConfig

from vgen.errors import reported


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
def main(config: DictConfig) -> None:
    """Run one sampling job; a mistake of the user ends with one line and status 2."""
    from vgen.checkpoints.sampling_job import sample

    with reported():
        sample(config)


if __name__ == "__main__":
    main()
