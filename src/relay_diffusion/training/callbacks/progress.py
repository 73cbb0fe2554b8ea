"""Progress of training and sampling, in images."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from relay_diffusion.models.relay import Samples
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.utils.progress import Advance, progress


class ImagesProgress(Callback):
    """Show a bar of `total` images: seen in training, with the latest loss and speed, or sampled.

    `done`: images sampled by earlier starts. Ranks that sample count as equally fast.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done = total, done
        self._stack = ExitStack()
        self._advance: Advance | None = None

    def _show(self, trainer: L.Trainer, description: str, done: int) -> None:
        bar = progress(description, self.total, done=done, enabled=trainer.is_global_zero)
        self._advance = self._stack.enter_context(bar)

    def _move(self, count: int, note: str | None = None) -> None:
        assert self._advance is not None
        self._advance(min(count, self.total - self._advance.done), note)

    def on_train_start(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Show the bar on rank 0."""
        self._show(trainer, "training", pl_module.images_seen)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar on rank 0."""
        self._show(trainer, "sampling", self.done)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: DiffusionStage, *args: Any) -> None:
        """Move the bar."""
        assert self._advance is not None
        latest = pl_module.fit_state.metrics
        note = "loss {loss:.4f}  {images_per_second:,.0f} images/s".format(**latest) if latest else ""
        if "memory_gib" in latest:
            note += f"  {latest['tflops']:.0f} TFLOP/s ({latest['utilisation']:.0%})  {latest['memory_gib']:.1f} GiB"
        self._move(pl_module.images_seen - self._advance.done, note)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Samples, *args: Any
    ) -> None:
        """Move the bar."""
        self._move(len(outputs.positions) * trainer.world_size)

    def on_train_end(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Close the bar."""
        self._stack.close()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._stack.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar before the message is printed."""
        self._stack.close()
