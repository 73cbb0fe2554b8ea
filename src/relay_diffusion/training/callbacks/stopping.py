"""End training early: diverged, out of time, or after a number of batches."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from relay_diffusion.errors import UserError
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training.callbacks.agreement import Agreement, Delayed
from relay_diffusion.training.callbacks.checkpoints import DIVERGED


class StopIfDiverged(Callback):
    """End training after `max_steps` consecutive steps without a finite loss or without a finite gradient.

    Raises UserError on all ranks at the same step, one step late: the count is copied from the device meanwhile.
    """

    def __init__(self, max_steps: int) -> None:
        if not 1 <= max_steps <= 10**9:
            raise ValueError(f"max_nonfinite_steps={max_steps}: must lie between 1 and 10^9")
        self.max_steps = max_steps
        self._count: Delayed | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Reset the count."""
        self._count = Delayed(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:  # noqa: ARG002
        """Check the count of the previous step."""
        assert isinstance(pl_module, DiffusionStage)
        assert self._count is not None
        if pl_module.mid_accumulation or pl_module.nonfinite_steps.count is None:
            return
        if self._count.exchange(pl_module.nonfinite_steps.count) >= self.max_steps:
            raise UserError(
                f"training has diverged: no finite loss, or no finite gradient, in {self.max_steps} consecutive steps "
                f"(trainer.max_nonfinite_steps), after {pl_module.images_seen:,} images; "
                f"{pl_module.fit_state.kept_checkpoint}: {DIVERGED}"
            )


class StopAfterBatches(Callback):
    """End training after `batches` more optimizer steps; training saves and ends as usual."""

    def __init__(self, batches: int) -> None:
        self.batches, self._last_step = batches, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Count from where training starts."""
        self._last_step = trainer.global_step + self.batches

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:  # noqa: ARG002
        """Ask the trainer to stop after the last step."""
        if trainer.global_step >= self._last_step:
            _stop(trainer, f"trainer.limit_train_batches={self.batches}")


class TimeLimit(Timer):
    """End training after `duration` (DD:HH:MM:SS, or a mapping such as {hours: 8}), over all starts of a run.

    All ranks stop after the same whole step; Lightning's Timer would wait for all ranks at every micro-batch.
    """

    def __init__(self, duration: str | timedelta | dict[str, int]) -> None:
        try:
            super().__init__(duration if isinstance(duration, dict | timedelta) else str(duration), verbose=False)
        except (MisconfigurationException, TypeError, ValueError, OverflowError):
            raise ValueError(f"max_time={duration}: write DD:HH:MM:SS, or a mapping such as {{hours: 8}}") from None
        if (self.time_remaining() or 0) < 0:
            raise ValueError(f"max_time={duration}: must not be negative")
        self._reason = f"trainer.max_time={duration}"
        self._agreement: Agreement | None = None

    def on_fit_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop before the first step if no time is left."""
        super().on_fit_start(trainer, *args, **kwargs)
        if trainer.should_stop:
            _stop(trainer, self._reason)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        if trainer.world_size > 1:
            self._agreement = Agreement(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Stop after a whole step, the same one on every rank."""
        stage = trainer.lightning_module
        assert isinstance(stage, DiffusionStage)
        if stage.mid_accumulation:
            return
        left = self.time_remaining()
        over = left is not None and left <= 0
        if over if self._agreement is None else self._agreement.largest(over):
            _stop(trainer, self._reason)


def _stop(trainer: L.Trainer, option: str) -> None:
    """End training after this step, because of `option`."""
    stage = trainer.lightning_module
    assert isinstance(stage, DiffusionStage)
    stage.fit_state.stop_reason = stage.fit_state.stop_reason or option
    trainer.should_stop = True
