"""Progress of training, in images."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.utils.progress import Advance, progress


class ImagesProgress(Callback):
    """Show a bar of `total` images, with the latest loss and speed."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._stack = ExitStack()
        self._advance: Advance | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Show the bar on rank 0."""
        bar = progress("training", self.total, done=pl_module.images_seen, enabled=trainer.is_global_zero)
        self._advance = self._stack.enter_context(bar)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: DiffusionStage, *args: Any) -> None:
        """Move the bar."""
        assert self._advance is not None
        latest = pl_module.fit_state.metrics
        note = "loss {loss:.4f}  {images_per_second:,.0f} images/s".format(**latest) if latest else ""
        if "memory_gib" in latest:
            note += f"  {latest['tflops']:.0f} TFLOP/s ({latest['utilisation']:.0%})  {latest['memory_gib']:.1f} GiB"
        self._advance.to(min(pl_module.images_seen, self.total), note)

    def on_train_end(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Close the bar."""
        self._stack.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar before the message is printed."""
        self._stack.close()
