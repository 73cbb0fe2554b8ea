"""The commands: `train.py` and `sample.py` here, `relay-train` and `relay-sample` of an installed package."""

from typing import NoReturn

import hydra
from omegaconf import DictConfig

from relay_diffusion.cli import clear_errors, command_line
from relay_diffusion.config import CONF, register_resolvers, validate_sampling, validate_training

register_resolvers()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def _train(cfg: DictConfig) -> None:
    with clear_errors():
        validate_training(cfg)

        from relay_diffusion import host, training  # torch and lightning: only once the settings are sound

        host.check_gpus(cfg.trainer)
        training.train(cfg)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="sample")
def _sample(cfg: DictConfig) -> None:
    with clear_errors():
        validate_sampling(cfg)

        from relay_diffusion import host, sampling

        host.check_gpus(cfg.trainer)
        sampling.sample(cfg)


def train() -> NoReturn:
    """Compose, validate, build, fit."""
    command_line(_train, CONF / "train.yaml", validate_training)


def sample() -> NoReturn:
    """Compose, validate, build, predict or evaluate."""
    command_line(_sample, CONF / "sample.yaml", validate_sampling)
