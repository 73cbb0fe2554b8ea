"""Stop at signals from a time limit, a preempted node or Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training.callbacks.stopping import Agreement
from relay_diffusion.utils.distributed import REQUEUED, SIGNALS, first_process, rank
from relay_diffusion.utils.slurm import requeue

IGNORABLE = (signal.SIGINT, signal.SIGHUP)  # background jobs of a shell and nohup ignore these


@contextmanager
def restored_signal_handlers() -> Iterator[None]:
    """Restore the present signal handlers after the block, unless the process exits.

    A notebook or a prompt of Python continues after SystemExit. Lightning restores handlers that were set after
    `setup`, as for sampling; those of training are set earlier.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    exits = False
    try:
        yield
    except SystemExit:
        exits = not hasattr(sys, "ps1")  # a second signal must not interrupt that
        raise
    finally:
        if not exits and threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Preemption(Callback):
    """Stop at a signal: training after a checkpoint, sampling at once.

    Signals: SIGINT (Ctrl-C), SIGHUP (the terminal was closed), SIGTERM, SIGUSR1 and SIGUSR2.
    Sampling keeps every finished image. A signal to one process stops all ranks; a second SIGINT stops training at
    once, without saving. Under SLURM, SIGUSR1 and SIGUSR2 (sent before the time limit with `--signal=USR1@300`)
    also requeue the job. SIGTERM does not: SLURM requeues preempted jobs itself, and a cancelled job must not restart.
    The exit code is 128 + the signal's number. Run `fit` inside `restored_signal_handlers`.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the signal
        self._reading: Agreement | None = None
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]  # a closed terminal is no tty

    def setup(self, trainer: L.Trainer, pl_module: DiffusionStage, stage: str) -> None:
        """Handle early signals; training stops after its first step."""
        if stage == "fit":
            _handle_signals(self._note)

    def on_train_start(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Replace Lightning's handlers, which save nothing."""
        self._reading = Agreement(trainer, pl_module.device)
        _handle_signals(self._note)

    def _note(self, number: int, _: Any) -> None:
        self._leave_closed_terminal(number)
        if number == signal.SIGINT:
            again = self.received == number
            if rank() == 0:
                text = "stopped at once" if again else "finishing this step and saving; Ctrl-C again stops at once"
                print(f"\n{text}", file=sys.stderr, flush=True)
            if again:
                raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: DiffusionStage, *args: Any) -> None:
        """Stop after an optimizer step, the same one on every rank."""
        if pl_module.mid_accumulation:
            return
        assert self._reading is not None
        pl_module.fit_state.stop_signal = self._reading.largest(self.received)
        if pl_module.fit_state.stop_signal:
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Ignore signals from now on."""
        _handle_signals(signal.SIG_IGN)

    def on_predict_start(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Exit at signals while sampling."""
        self.leave_at_signals(trainer)

    def leave_at_signals(self, trainer: L.Trainer) -> None:
        """Exit at a signal, with all ranks."""

        def leave(number: int, _: Any) -> None:
            if self.received:
                return  # already exiting
            self.received = number
            self._leave_closed_terminal(number)
            first = first_process()
            if first is not None and not trainer.is_global_zero:
                os.kill(first, number)  # rank 0 terminates the others and prints the message
            leave_after_signal(trainer, number)

        _handle_signals(leave)

    def _leave_closed_terminal(self, number: int) -> None:
        """Redirect output to the null device after SIGHUP.

        Writing to a closed terminal fails.
        """
        if number == signal.SIGHUP and self._terminals:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in self._terminals:
                os.dup2(nowhere, stream)
            os.close(nowhere)


def _handle_signals(handler: Callable[[int, Any], None] | signal.Handlers) -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # Python runs handlers in the main thread only
    for number in SIGNALS:
        if number in IGNORABLE and signal.getsignal(number) is signal.SIG_IGN:
            continue
        signal.signal(number, handler)


def leave_after_signal(trainer: L.Trainer, number: int) -> None:
    """End the process after signal `number`; SIGUSR1 and SIGUSR2 requeue the job."""
    if not trainer.is_global_zero:
        raise SystemExit(0)  # rank 0 prints the message
    print(f"stopped by {signal.Signals(number).name}: the same command continues", flush=True)
    if number in REQUEUED:
        requeue()
    raise SystemExit(128 + number)
