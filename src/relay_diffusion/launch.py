"""What the launcher of a run, SLURM or torchrun, tells its processes. Imports neither torch nor lightning."""

from __future__ import annotations

import os

from relay_diffusion.errors import UserError

INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which commands are started by hand


def rank() -> int:
    """This process's number among those of its run."""
    return next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)


def check_processes(world: int) -> None:
    """Raise UserError if the launcher started another number of processes than the run has devices."""
    for name, launcher in (("SLURM_NTASKS", "SLURM"), ("WORLD_SIZE", "torchrun")):
        by_hand = launcher == "SLURM" and os.environ.get("SLURM_JOB_NAME") in INTERACTIVE
        by_lightning = "TORCHELASTIC_RUN_ID" not in os.environ and launcher == "torchrun"
        if name in os.environ and not by_hand and not by_lightning and int(os.environ[name]) != world:
            raise UserError(
                f"trainer.devices x trainer.num_nodes are {world} processes, but {launcher} started "
                f"{os.environ[name]}: make them equal (docs/cluster.md)"
            )
