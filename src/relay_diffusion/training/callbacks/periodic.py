"""Base classes of periodic callbacks, with periods in images."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training.loggers import last_step, logged_row, send_row


@contextmanager
def exclude_from_throughput(stage: DiffusionStage) -> Iterator[None]:
    """Exclude the block's time from the logged throughput."""
    if stage.device.type == "cuda":
        torch.cuda.synchronize()  # queued steps count as training
    started = time.perf_counter()
    try:
        yield
    finally:
        stage.fit_state.excluded_seconds += time.perf_counter() - started


def log_row(
    trainer: L.Trainer, stage: DiffusionStage, group: str, values: Mapping[str, float], again: bool = False
) -> None:
    """Log values as `group`/... at the images seen.

    Also sets `trainer.callback_metrics` and calls `on_validation_end` of callbacks whose `monitor` is one of the values
    (Lightning's EarlyStopping, our Checkpoints), because the stream of images has no epochs. Call it on all ranks, from
    on_train_batch_end or on_train_epoch_end. again: the loggers already have this row, from before a resume.
    """
    if not again:
        send_row(trainer.loggers, group, values, stage.images_seen)
    row = {f"{group}/{key}": float(value) for key, value in values.items()}
    stage.log_dict(row, logger=False, batch_size=1)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if getattr(callback, "monitor", None) in row:
            callback.on_validation_end(trainer, stage)


class PeriodicCallback(Callback, ABC):
    """Call `act` every `every_n_images` images and at the end.

    0 disables. The last call is in on_train_epoch_end, after the last checkpoint. It is skipped if a signal stops the
    run, to leave the remaining time to the checkpoint. Disabled by trainer.fast_dev_run. A disabled callback logs
    nothing, so others cannot monitor its metrics. `Checkpoints` cannot be disabled by 0.
    """

    def __init__(self, every_n_images: int) -> None:
        if not every_n_images >= 0:
            raise ValueError(f"every_n_images={every_n_images}: must be at least 0")
        self.every_n_images = every_n_images
        self._checked = 0  # images seen when `due` was last called
        self._acted = -1  # images seen at the last action

    @abstractmethod
    def act(self, trainer: L.Trainer, stage: DiffusionStage) -> None:
        """Act on the present state. Called on every rank, at most once per image count."""

    def due(self, images_seen: int) -> bool:
        """Return whether a multiple of `every_n_images` was reached since the last call."""
        if self.every_n_images <= 0:
            return False
        passed = images_seen // self.every_n_images > self._checked // self.every_n_images
        self._checked = images_seen
        return passed

    def on_train_start(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Start counting at the images already seen."""
        self._checked = pl_module.images_seen

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: DiffusionStage, *args: Any) -> None:
        """Act when due, except at the end of training."""
        if self.due(pl_module.images_seen) and not trainer.should_stop:
            self._act_once(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Act at the end of training, unless the last step did."""
        if self.every_n_images > 0 and not pl_module.fit_state.stop_signal:
            self._act_once(trainer, pl_module)

    def _act_once(self, trainer: L.Trainer, stage: DiffusionStage) -> None:
        if stage.images_seen != self._acted and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._acted = stage.images_seen
            self.act(trainer, stage)


class PeriodicMeasurement(PeriodicCallback):
    """Measure periodically and log the results as `group`/....

    Measures every `every_n_images` images and at the end, without an effect on training. After a resume, image counts
    that were measured before are not measured again: callbacks that monitor the metrics get the logged values.
    """

    group: ClassVar[str]

    def __init__(self, every_n_images: int) -> None:
        super().__init__(every_n_images)
        self._before = -1  # images seen at the newest measurement before a resume

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names of the metrics that `measure` returns."""

    @abstractmethod
    def measure(self, trainer: L.Trainer, stage: DiffusionStage) -> dict[str, float]:
        """Return the metrics, equal on all ranks; empty logs nothing.

        Collective, without gradients.
        """

    @property
    def logged(self) -> list[str]:
        """The metrics that callbacks can monitor."""
        return [f"{self.group}/{name}" for name in self.names] if self.every_n_images > 0 else []

    def on_train_start(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Start counting at the images already seen."""
        super().on_train_start(trainer, pl_module)
        self._before = trainer.strategy.broadcast(last_step(trainer.loggers, self.group))  # the same on all ranks

    @torch.no_grad()
    def act(self, trainer: L.Trainer, stage: DiffusionStage) -> None:
        """Measure, print and log, or pass logged values to monitoring callbacks."""
        if stage.images_seen <= self._before:
            known = logged_row(trainer.loggers, self.group, stage.images_seen) if trainer.is_global_zero else {}
            log_row(trainer, stage, self.group, trainer.strategy.broadcast(known), again=True)
            return
        with exclude_from_throughput(stage):
            results = self.measure(trainer, stage)
        if results:
            if trainer.is_global_zero:
                measured = ", ".join(f"{self.group}/{name} {value:.4g}" for name, value in results.items())
                print(f"{stage.images_seen:,} images: {measured}", flush=True)
            log_row(trainer, stage, self.group, results)
