"""Sweeps (--multirun): all jobs are checked before the first of them starts. Imports neither torch nor lightning."""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from relay_diffusion.errors import require
from relay_diffusion.utils.messages import shown

SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
PLACES = ("output", "run_dir", "run_id")  # what two jobs cannot share


class JobError(Exception):
    """What went wrong in a job of a sweep, as text that other processes can show.

    job: "job 3 (seed=2)". text: one line for a mistake of the user (code 2), a traceback for a bug (code 1).
    """

    def __init__(self, job: str, text: str, code: int) -> None:
        super().__init__(job, text, code)
        self.job, self.text, self.code = job, text, code
        self.shown = False  # in this process: a copy that comes from another one has to be shown here too

    def __reduce__(self) -> tuple[type[JobError], tuple[Any, ...]]:
        return JobError, self.args

    def show(self) -> None:
        """Print the error, once."""
        if not self.shown:
            print(f"error in {self.job}: {self.text}".rstrip(), file=sys.stderr, flush=True)
        self.shown = True


def check_launcher(target: str) -> None:
    """Raise UserError if the launcher of a sweep cannot work on this host; `target`: its class."""
    require(
        target != SLURM or shutil.which("sbatch") is not None,
        "hydra/launcher: the jobs go to SLURM, but there is no sbatch on this host: start the sweep where SLURM is, or "
        "use hydra/launcher=submitit_local or basic",
    )


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
