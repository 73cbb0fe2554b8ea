"""Sampled images to PNG files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from relay_diffusion.models.relay import Samples
from relay_diffusion.sampling.image_store import ImageStore
from relay_diffusion.sampling.plan import Plan


class ImageWriter(Callback):
    """Writes the final images of a plan to an ImageStore; those that it holds stay as they are.

    missing: positions in the plan of the images to write, as rank 0 has found them.
    """

    def __init__(self, store: ImageStore, plan: Plan, missing: Iterable[int]) -> None:
        self.store, self.plan, self.missing = store, plan, frozenset(missing)

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
            if position in self.missing:
                self.store.write(self.plan.names[position], image)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Go on only when every device has written its images: they may be packed then."""
        trainer.strategy.barrier()
