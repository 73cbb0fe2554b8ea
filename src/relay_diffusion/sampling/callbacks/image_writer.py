"""Write sampled images to PNG files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from relay_diffusion.models.relay import Samples
from relay_diffusion.sampling.image_store import ImageStore
from relay_diffusion.sampling.plan import Plan


class ImageWriter(BasePredictionWriter):
    """Write the missing images of a plan to an ImageStore.

    missing: positions in the plan, determined on rank 0.
    """

    def __init__(self, store: ImageStore, plan: Plan, missing: Iterable[int]) -> None:
        super().__init__(write_interval="batch")
        self.store, self.plan, self.missing = store, plan, frozenset(missing)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Create the folder on rank 0."""
        if trainer.is_global_zero:
            self.store.begin()
        trainer.strategy.barrier()

    def write_on_batch_end(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,  # noqa: ARG002
        prediction: Samples,
        *args: Any,  # noqa: ARG002
    ) -> None:
        """Write the missing images of a batch."""
        for position, image in zip(prediction.positions.tolist(), prediction.images.cpu(), strict=True):
            if position in self.missing:
                self.store.write(self.plan.names[position], image)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Wait until all ranks have written, before images are packed."""
        trainer.strategy.barrier()
