"""Numbers of the averaged weights, measured every so many images beside training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training.callbacks.periodic import Every
from relay_diffusion.training.callbacks.preemption import preempted
from relay_diffusion.training.callbacks.rows import log_row
from relay_diffusion.training.callbacks.training_log import not_training
from relay_diffusion.training.loggers import last_step, logged_row


class PeriodicMeasurement(Callback, ABC):
    """Measure every `every_n_images` and at the end, and log the numbers as `group`/...; 0 measures nothing.

    Training goes on as if it were not there. An amount of images that was measured before the run was resumed is not
    measured again: callbacks that monitor the numbers get those of the log.
    """

    group: ClassVar[str]

    def __init__(self, every_n_images: int) -> None:
        self._every = Every(every_n_images)
        self._measured, self._before = -1, -1  # images seen at the newest measurement, now and before a resume

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """What `measure` gives."""

    @abstractmethod
    def measure(self, trainer: L.Trainer, stage: DiffusionStage) -> dict[str, float]:
        """The numbers, the same on all ranks, or none if that is reported; every rank calls it, without gradients."""

    @property
    def logged(self) -> list[str]:
        """The metrics that callbacks can monitor."""
        return [f"{self.group}/{name}" for name in self.names] if self._every.images > 0 else []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from where training starts."""
        assert isinstance(pl_module, DiffusionStage)
        self._every.start(pl_module.images_seen)
        self._before = trainer.strategy.broadcast(last_step(trainer.loggers, self.group))  # the same on all ranks

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:  # noqa: ARG002
        """Measure when due; the end of training in on_train_epoch_end, after it is saved."""
        assert isinstance(pl_module, DiffusionStage)
        if self._every(pl_module.images_seen) and not trainer.should_stop:
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the end of training, unless that was just done."""
        assert isinstance(pl_module, DiffusionStage)
        if self._every.images > 0 and not preempted(trainer):
            self._log(trainer, pl_module)

    @torch.no_grad()
    def _log(self, trainer: L.Trainer, stage: DiffusionStage) -> None:
        if stage.images_seen == self._measured or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._measured = stage.images_seen
        if stage.images_seen <= self._before:
            known = logged_row(trainer.loggers, self.group, stage.images_seen) if trainer.is_global_zero else {}
            log_row(trainer, stage, self.group, trainer.strategy.broadcast(known), again=True)
            return
        with not_training(trainer):
            results = self.measure(trainer, stage)
        if results:
            log_row(trainer, stage, self.group, results)
