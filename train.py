"""Train one stage of a relay: python train.py experiment=NAME [KEY=VALUE ...]; --help shows what can be set."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from relay_diffusion.cli import clear_errors, command_line
from relay_diffusion.config import register_resolvers, validate_training

register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Compose, validate, build, fit."""
    with clear_errors():
        validate_training(cfg)

        from relay_diffusion.training import train  # torch and lightning: only once the settings are sound

        train(cfg)


if __name__ == "__main__":
    command_line(main, Path(__file__).parent / "conf" / "train.yaml")
