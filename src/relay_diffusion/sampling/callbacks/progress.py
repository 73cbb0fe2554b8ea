"""Progress of sampling and of evaluation."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from relay_diffusion.models.relay import Samples
from relay_diffusion.utils.progress import Advance, progress


class SamplingProgress(Callback):
    """Progress bar of sampled images, over all ranks as if they were equally fast."""

    def __init__(self, description: str, total: int, done: int = 0) -> None:
        self.description, self.total, self.done = description, total, done
        self._stack = ExitStack()
        self._advance: Advance | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Show the bar on rank 0."""
        bar = progress(self.description, self.total, done=self.done, enabled=trainer.is_global_zero)
        self._advance = self._stack.enter_context(bar)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,  # noqa: ARG002
        outputs: Samples,
        *args: Any,  # noqa: ARG002
    ) -> None:
        """Move the bar."""
        assert self._advance is not None
        self._advance(min(len(outputs.positions) * trainer.world_size, self.total - self._advance.done))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Close the bar."""
        self._stack.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Close the bar before the message is printed."""
        self._stack.close()
