"""What the launcher of a run, SLURM or torchrun, tells its processes. Imports neither torch nor lightning."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta

from relay_diffusion.errors import UserError

RUN_ID = "RELAY_DIFFUSION_RUN_ID"  # gives rank 0's run id to the ranks that it starts, in their environment alone
REQUEUED = (signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, *REQUEUED)  # ask a run to stop
FAILED = "relay_diffusion/failed"  # key of the store that says which rank failed first
STORE_SECONDS = 3  # until rank 0 counts as gone
INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which commands are started by hand


def rank() -> int:
    """This process's number among those of its run."""
    return next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)


def first_process() -> int | None:
    """The process of the first rank of this host, if that started this one; None under SLURM and torchrun."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ
    return None if launched or "LOCAL_RANK" not in os.environ else os.getppid()


def ranks_differ() -> bool:
    """Whether ranks work together already; before that they do the same, and meet the same errors."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def leave_group() -> None:
    """End the connection to the other ranks, which do it too: left to the end of the process, threads may abort it."""
    if ranks_differ():
        sys.modules["torch.distributed"].destroy_process_group()


def first_failure(code: int) -> tuple[int, int]:
    """Rank and exit code of the rank that failed first; this one and `code`, if no other has failed before.

    Every rank that fails calls it once, before it closes its connections: the others meet errors of the network then,
    of types and texts that differ between backends. The ranks agree in the store of their process group.
    """
    if not ranks_differ():
        return rank(), code
    distributed = sys.modules["torch.distributed"]
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = distributed.TCPStore(host, port, timeout=timedelta(seconds=STORE_SECONDS), wait_for_workers=False)
        said = store.compare_set(FAILED, "", f"{rank()} {code}").decode()
    except distributed.DistError:  # the store is a part of rank 0, which has left
        return 0, code
    first, its_code = map(int, said.split())
    return first, its_code


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
