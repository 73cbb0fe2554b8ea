"""Sampled images to PNG files."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from relay_diffusion.batches import Samples
from relay_diffusion.image_store import ImageStore
from relay_diffusion.plan import Plan


class ImageWriter(Callback):
    """Writes the final images of a plan to an ImageStore; those that are there stay as they are."""

    def __init__(self, store: ImageStore, plan: Plan) -> None:
        self.store, self.plan = store, plan

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Prepare the folder once."""
        if trainer.is_global_zero:
            self.store.begin()
        trainer.strategy.barrier()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,  # noqa: ARG002
        outputs: Samples,
        *args: Any,  # noqa: ARG002
    ) -> None:
        """Write the batch."""
        for position, image in zip(outputs.positions.tolist(), outputs.images.cpu(), strict=True):
            if self.plan.names[position] not in self.store:
                self.store.write(self.plan.names[position], image)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Go on only when every device has written its images: they may be packed then."""
        trainer.strategy.barrier()
