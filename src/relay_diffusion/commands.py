"""The commands: `train.py` and `sample.py` here, `relay-train` and `relay-sample` of an installed package."""

from typing import NoReturn

from omegaconf import DictConfig

from relay_diffusion.cli import command_line, report_errors, run_directory
from relay_diffusion.config import CONF, register_resolvers, validate_sampling, validate_training

TRAIN, SAMPLE = CONF / "train.yaml", CONF / "sample.yaml"


def _train(cfg: DictConfig) -> None:
    with report_errors(TRAIN):
        validate_training(cfg)
        with run_directory(cfg.run_dir):
            from relay_diffusion import host, training  # torch and lightning: only once the settings are sound

            host.check_gpus(cfg.trainer)
            training.train(cfg)


def _sample(cfg: DictConfig) -> None:
    with report_errors(SAMPLE):
        validate_sampling(cfg)
        with run_directory(cfg.output):
            from relay_diffusion import host, sampling

            host.check_gpus(cfg.trainer)
            sampling.sample(cfg)


def train() -> NoReturn:
    """Compose, validate, build, fit."""
    register_resolvers()
    command_line(_train, TRAIN, validate_training)


def sample() -> NoReturn:
    """Compose, validate, build, predict or evaluate."""
    register_resolvers()
    command_line(_sample, SAMPLE, validate_sampling)
