"""End training at a number of images, divergence or a time limit."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from relay_diffusion.errors import UserError
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training.callbacks.checkpoints import DIVERGED


class Delayed:
    """Read an int32 from the device one call late, without synchronization."""

    def __init__(self, device: torch.device) -> None:
        self._seen = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._ready = torch.cuda.Event() if device.type == "cuda" else None

    def exchange(self, value: Tensor) -> int:
        """Keep `value` (int32, one element); return the previous one, at first 0."""
        if self._ready is not None:
            self._ready.synchronize()  # only the previous step has finished on the device
        before = int(self._seen)
        self._seen.copy_(value, non_blocking=True)
        if self._ready is not None:
            self._ready.record()
        return before


class Agreement:
    """Maximum over all ranks, one call late (immediate with one rank)."""

    def __init__(self, trainer: L.Trainer, device: torch.device) -> None:
        self._sum = torch.zeros(1, dtype=torch.int32, device=device) if trainer.world_size > 1 else None
        self._delayed = Delayed(device)

    def largest(self, mine: int) -> int:
        """Reduce `mine`; return the maximum of the previous call. Collective."""
        if self._sum is None:
            return mine
        self._sum.fill_(mine)
        dist.all_reduce(self._sum, dist.ReduceOp.MAX)
        return self._delayed.exchange(self._sum)


class StopAtImages(Callback):
    """End training at `max_images` images or after `limit_train_batches` optimizer steps.

    Images count over all starts of a run, steps from the present start.
    """

    def __init__(self, max_images: int, limit_train_batches: int | None = None) -> None:
        if not max_images >= 1:
            raise ValueError(f"max_images={max_images}: must be at least 1")
        if limit_train_batches is not None and not limit_train_batches >= 1:
            raise ValueError(f"limit_train_batches={limit_train_batches}: must be at least 1, or null")
        self.max_images, self.batches = max_images, limit_train_batches
        self._first_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Start counting the optimizer steps."""
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: DiffusionStage, *args: Any) -> None:
        """Stop after the last step."""
        if pl_module.images_seen >= self.max_images:
            trainer.should_stop = True
        if self.batches is not None and trainer.global_step >= self._first_step + self.batches:
            _stop(trainer, pl_module, f"trainer.limit_train_batches={self.batches}")


class StopIfDiverged(Callback):
    """End training after `max_steps` consecutive steps without a finite loss or gradient.

    Raises UserError on all ranks at the same step, one step late, because the count is copied asynchronously.
    """

    def __init__(self, max_steps: int) -> None:
        if not 1 <= max_steps <= 10**9:
            raise ValueError(f"max_nonfinite_steps={max_steps}: must lie between 1 and 10^9")
        self.max_steps = max_steps
        self._count: Delayed | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Reset the count."""
        self._count = Delayed(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: DiffusionStage, *args: Any) -> None:
        """Check the count of the previous step."""
        assert self._count is not None
        if pl_module.mid_accumulation or pl_module.nonfinite_steps.count is None:
            return
        if self._count.exchange(pl_module.nonfinite_steps.count) >= self.max_steps:
            raise UserError(
                f"training has diverged: no finite loss, or no finite gradient, in {self.max_steps} consecutive steps "
                f"(trainer.max_nonfinite_steps), after {pl_module.images_seen:,} images; "
                f"{pl_module.fit_state.kept_checkpoint}: {DIVERGED}"
            )


class TimeLimit(Timer):
    """End training after `duration` over all starts of a run.

    duration: DD:HH:MM:SS, or a mapping such as {hours: 8}. All ranks stop after the same optimizer step; Lightning's
    Timer would wait for all ranks at every micro-batch.
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

    def on_fit_start(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Stop before the first step if no time is left."""
        super().on_fit_start(trainer, pl_module)
        if trainer.should_stop:
            _stop(trainer, pl_module, self._reason)

    def on_train_start(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._agreement = Agreement(trainer, pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: DiffusionStage, *args: Any) -> None:
        """Stop after an optimizer step, the same one on every rank."""
        assert self._agreement is not None
        if pl_module.mid_accumulation:
            return
        left = self.time_remaining()
        if self._agreement.largest(left is not None and left <= 0):
            _stop(trainer, pl_module, self._reason)


def _stop(trainer: L.Trainer, stage: DiffusionStage, option: str) -> None:
    """End training after this step; `option` is the reason."""
    stage.fit_state.stop_reason = stage.fit_state.stop_reason or option
    trainer.should_stop = True
