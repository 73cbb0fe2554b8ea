"""Sampled images to PNG files, one a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from relay_diffusion.pictures import image_grid, save_png
from relay_diffusion.samples import ImageFolder


class ImageWriter(Callback):
    """Writes the last stage's images to an ImageFolder."""

    def __init__(self, folder: ImageFolder) -> None:
        self.folder = folder

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Prepare the folder once."""
        if trainer.is_global_zero:
            self.folder.begin()
        trainer.strategy.barrier()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,  # noqa: ARG002
        outputs: Mapping[str, Tensor],
        batch: Any,
        *args: Any,  # noqa: ARG002
    ) -> None:
        """Write the batch."""
        images = list(outputs.values())[-1].cpu()
        for seed, image in zip(batch[0].tolist(), images, strict=True):
            save_png(image_grid(image[None], columns=1), self.folder.path(seed))
