"""Launcher, process group and rank-0 decisions of a distributed run.

Launchers are SLURM, torchrun and Lightning.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from relay_diffusion.errors import UserError
from relay_diffusion.utils.host import prepare_host
from relay_diffusion.utils.run_lock import run_lock
from relay_diffusion.utils.slurm import is_interactive

if TYPE_CHECKING:
    import lightning as L

T = TypeVar("T")

RUN_ID = "RELAY_DIFFUSION_RUN_ID"  # environment variable that passes rank 0's run id to the ranks it starts
REQUEUED = (signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, *REQUEUED)  # signals that stop a run
FAILED = "relay_diffusion/failed"  # key of the store: the rank that failed first
STORE_SECONDS = 3  # timeout after which rank 0 is assumed to have exited


def rank() -> int:
    """Return the global rank of this process, 0 outside a distributed run."""
    return next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)


def first_process() -> int | None:
    """Return the pid of local rank 0 if it launched this process.

    None under SLURM and torchrun.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ
    return None if launched or "LOCAL_RANK" not in os.environ else os.getppid()


def exit_for_parent_only(worker: int) -> None:  # noqa: ARG001
    """Exit this data worker on SIGTERM, but only from its parent.

    The parent terminates hung workers; SIGTERM from any other process is ignored.
    """
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def ranks_differ() -> bool:
    """Return whether the process group is initialized.

    Before that, all ranks fail with the same errors.
    """
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def destroy_process_group() -> None:
    """Destroy the process group (collective).

    At interpreter exit its threads could abort the process.
    """
    if ranks_differ():
        sys.modules["torch.distributed"].destroy_process_group()


def first_failure(code: int) -> tuple[int, int]:
    """Return rank and exit code of the rank that failed first.

    Call once per failing rank, before its connections close: other ranks then fail with network errors that differ
    between backends. The ranks agree through the store of their process group.
    """
    if not ranks_differ():
        return rank(), code
    distributed = sys.modules["torch.distributed"]
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = distributed.TCPStore(host, port, timeout=timedelta(seconds=STORE_SECONDS), wait_for_workers=False)
        first, its_code = map(int, store.compare_set(FAILED, "", f"{rank()} {code}").split())
    except distributed.DistError:  # rank 0 hosts the store and has exited
        return 0, code
    return first, its_code


def check_processes(world: int) -> None:
    """Raise UserError unless the launcher started one process per device."""
    for name, launcher in (("SLURM_NTASKS", "SLURM"), ("WORLD_SIZE", "torchrun")):
        by_hand = launcher == "SLURM" and is_interactive()
        by_lightning = "TORCHELASTIC_RUN_ID" not in os.environ and launcher == "torchrun"
        if name in os.environ and not by_hand and not by_lightning and int(os.environ[name]) != world:
            raise UserError(
                f"trainer.devices x trainer.num_nodes are {world} processes, but {launcher} started "
                f"{os.environ[name]}: make them equal (docs/cluster.md)"
            )


@contextmanager
def started_ranks(trainer: L.Trainer, run_id: str, directory: str, option: str) -> Iterator[None]:
    """Start the other ranks and lock the run directory during the block.

    Rank 0 holds the lock. Lightning would start the ranks within `fit` and `predict`, but rank 0 decides for all of
    them earlier. The ranks are terminated if the block fails. Raises UserError if another run uses `directory`, the
    value of `option`, or unless the launcher started one process per device.
    """
    prepare_host(trainer.strategy.root_device)
    check_processes(trainer.num_devices * trainer.num_nodes)
    with ExitStack() as stack:  # around the ranks, so the lock outlives them
        try:
            _start_ranks(trainer, run_id)
            on_rank_zero(trainer, lambda: stack.enter_context(run_lock(directory, option)))
            yield
        except BaseException:
            kill = getattr(trainer.strategy.launcher, "kill", None)
            if kill is not None:
                kill(signal.SIGKILL)  # ranks that wait in a collective ignore SIGTERM
            raise


def on_rank_zero(trainer: L.Trainer, decide: Callable[[], T]) -> T:
    """Call `decide` on rank 0 and return its result on all ranks (collective).

    Ranks may see a shared file system in different states and would then deadlock.
    Raises UserError on all ranks if rank 0 does.
    """
    decision: T | None = None
    problem: str | None = None
    if trainer.is_global_zero:
        try:
            decision = decide()
        except UserError as error:
            problem = str(error)
    decision, problem = trainer.strategy.broadcast((decision, problem))
    if problem is not None:
        destroy_process_group()  # every rank takes this branch; afterwards only rank 0 reports errors
        raise UserError(problem)
    return decision  # type: ignore[return-value]  # broadcast from rank 0


def _start_ranks(trainer: L.Trainer, run_id: str) -> None:
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher  # Lightning exports no public name

    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return  # a single process, or forked ranks that inherit the decision
    before = os.environ.get(RUN_ID)
    os.environ[RUN_ID] = run_id  # inherited by the launched ranks
    try:
        launcher.launch(trainer.strategy.setup_environment, trainer=trainer)
    finally:
        if before is None:
            del os.environ[RUN_ID]
        else:
            os.environ[RUN_ID] = before
