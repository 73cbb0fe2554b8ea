"""Configuration of the commands. Imports neither torch nor lightning."""

from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from relay_diffusion.config.run_dir import register_resolvers
from relay_diffusion.utils.files import CONF

__all__ = ["CONF", "compose"]


def compose(name: str, overrides: Sequence[str] = (), conf: Path = CONF) -> DictConfig:
    """Compose the configuration of a command from Python.

    name: train or sample. overrides: as on the command line, e.g. ["experiment=quickstart_base"]. conf: directory of
    the yaml files. Give the result to `training.run.train` or `sampling.run.sample`. Raises Hydra's exceptions for an
    unknown option or choice.
    """
    register_resolvers()
    with hydra.initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        return hydra.compose(name, list(overrides))
