"""Sweeps (--multirun): all jobs are checked before the first of them starts. Imports neither torch nor lightning."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from relay_diffusion.checks import require, shown

PLACES = ("output", "run_dir", "run_id")  # what two jobs cannot share


def check_sweep(arguments: Namespace, config: Path, validate: Callable[[DictConfig], None]) -> None:
    """Compose and validate the jobs of a command line, as Hydra reads it, if it is a sweep.

    config: the yaml of the command. Raises UserError also for a directory or an id that jobs would share. Jobs that
    another sweeper chooses, or that are composed from other files, check themselves when they start.
    """
    elsewhere = arguments.config_dir or arguments.config_path or arguments.config_name
    if not arguments.multirun or elsewhere or any(word.startswith("hydra/sweeper") for word in arguments.overrides):
        return
    with initialize_config_dir(str(config.parent.resolve()), version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        overrides = parser.parse_overrides(arguments.overrides)
        jobs = [compose(config.stem, job) for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]
    given = [override.key_or_group for override in overrides]
    for key in PLACES:
        if key in given:
            _check_own(key, [str(job[key]) for job in jobs])
    for job in jobs:
        validate(job)


def _check_own(key: str, values: Sequence[str]) -> None:
    twice = next((value for value in values if values.count(value) > 1), None)
    require(
        twice is None,
        f"{key}={shown(twice)}: jobs of the sweep would share it: leave {key} out, and each job gets its own",
    )
