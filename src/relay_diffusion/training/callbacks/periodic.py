"""Base of callbacks that act every so many images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from relay_diffusion.models.stage import DiffusionStage


class PeriodicCallback(Callback, ABC):
    """Call `act` every `every_n_images` images and at the end of training; 0 disables.

    The end comes in on_train_epoch_end, after it is saved. A run that a signal stops skips it: the remaining time is
    for the checkpoint. Disabled by trainer.fast_dev_run.
    """

    def __init__(self, every_n_images: int) -> None:
        if not every_n_images >= 0:
            raise ValueError(f"every_n_images={every_n_images}: must be at least 0")
        self.every_n_images = every_n_images
        self._checked = 0  # images seen when `due` was last called
        self._acted = -1  # images seen at the last action

    @abstractmethod
    def act(self, trainer: L.Trainer, stage: DiffusionStage) -> None:
        """Act on the present state; every rank calls it, at most once for an amount of images."""

    def due(self, images_seen: int) -> bool:
        """Whether a multiple of `every_n_images` was reached since the last call."""
        if self.every_n_images <= 0:
            return False
        passed = images_seen // self.every_n_images > self._checked // self.every_n_images
        self._checked = images_seen
        return passed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Count from where training starts."""
        assert isinstance(pl_module, DiffusionStage)
        self._checked = pl_module.images_seen

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:  # noqa: ARG002
        """Act when due, except at the end of training."""
        assert isinstance(pl_module, DiffusionStage)
        if self.due(pl_module.images_seen) and not trainer.should_stop:
            self._act_once(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Act at the end of training, unless that was just done."""
        assert isinstance(pl_module, DiffusionStage)
        if self.every_n_images > 0 and not pl_module.fit_state.stop_signal:
            self._act_once(trainer, pl_module)

    def _act_once(self, trainer: L.Trainer, stage: DiffusionStage) -> None:
        if stage.images_seen != self._acted and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._acted = stage.images_seen
            self.act(trainer, stage)
