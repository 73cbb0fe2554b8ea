"""The ranks of one run: started together, and decided for by rank 0."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import lightning as L
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from relay_diffusion.errors import UserError
from relay_diffusion.host import prepare_host
from relay_diffusion.launch import RUN_ID, leave_group
from relay_diffusion.run_lock import run_lock
from relay_diffusion.trainer import children_end_too

T = TypeVar("T")


@contextmanager
def started_ranks(trainer: L.Trainer, run_id: str, directory: str, option: str) -> Iterator[None]:
    """Start the other ranks and lock the run's directory, as long as the block runs; rank 0 holds the lock.

    Lightning would start the ranks within `fit` and `predict`; rank 0 has to decide for all of them before. If the
    block fails, they end. Raises UserError if another run uses `directory`, which the user gave as `option`.
    """
    prepare_host(trainer.strategy.root_device)
    with ExitStack() as stack, children_end_too(trainer):  # all ranks have ended when the lock is released
        _start_ranks(trainer, run_id)
        on_rank_zero(trainer, lambda: stack.enter_context(run_lock(directory, option)))
        yield


def on_rank_zero(trainer: L.Trainer, decide: Callable[[], T]) -> T:
    """Call `decide` on rank 0 and return its result on all ranks; within `started_ranks`.

    What ranks read from a shared file system may differ, and they would wait for each other for ever.
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
        leave_group()  # all ranks are here; from now on only rank 0 reports errors
        raise UserError(problem)
    return decision  # type: ignore[return-value]  # rank 0 made it


def _start_ranks(trainer: L.Trainer, run_id: str) -> None:
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return  # one process, or Lightning copies what this one decides into the others
    before = os.environ.get(RUN_ID)
    os.environ[RUN_ID] = run_id  # for the processes that this starts
    try:
        launcher.launch(trainer.strategy.setup_environment, trainer=trainer)
    finally:
        if before is None:
            del os.environ[RUN_ID]
        else:
            os.environ[RUN_ID] = before
