"""Measure the averaged weights every so many images during training."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import lightning as L
import torch

from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training.callbacks.periodic import PeriodicCallback
from relay_diffusion.training.callbacks.rows import log_row
from relay_diffusion.training.callbacks.training_log import exclude_from_throughput
from relay_diffusion.training.loggers import last_step, logged_row


class PeriodicMeasurement(PeriodicCallback):
    """Measure every `every_n_images` and at the end, and log the numbers as `group`/...; 0 measures nothing.

    It does not change training. An amount of images that was measured before the run was resumed is not
    measured again: callbacks that monitor the numbers get those of the log.
    """

    group: ClassVar[str]

    def __init__(self, every_n_images: int) -> None:
        super().__init__(every_n_images)
        self._before = -1  # images seen at the newest measurement before a resume

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names of the numbers that `measure` returns."""

    @abstractmethod
    def measure(self, trainer: L.Trainer, stage: DiffusionStage) -> dict[str, float]:
        """The numbers, the same on all ranks, or none if that is reported; every rank calls it, without gradients."""

    @property
    def logged(self) -> list[str]:
        """The metrics that callbacks can monitor."""
        return [f"{self.group}/{name}" for name in self.names] if self.every_n_images > 0 else []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from where training starts."""
        super().on_train_start(trainer, pl_module)
        self._before = trainer.strategy.broadcast(last_step(trainer.loggers, self.group))  # the same on all ranks

    @torch.no_grad()
    def act(self, trainer: L.Trainer, stage: DiffusionStage) -> None:
        """Measure and log, or repeat the logged numbers to callbacks that monitor them."""
        if stage.images_seen <= self._before:
            known = logged_row(trainer.loggers, self.group, stage.images_seen) if trainer.is_global_zero else {}
            log_row(trainer, stage, self.group, trainer.strategy.broadcast(known), again=True)
            return
        with exclude_from_throughput(stage):
            results = self.measure(trainer, stage)
        if results:
            log_row(trainer, stage, self.group, results)
