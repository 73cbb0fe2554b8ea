"""Draw the start and the result of every stage."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from relay_diffusion.diffusion.corruption import upsample_blocks
from relay_diffusion.diffusion.pixels import to_uint8
from relay_diffusion.models.relay import Samples
from relay_diffusion.utils.pictures import image_grid, save_png, side_by_side


class RelayPicture(Callback):
    """Draw the first `count` samples of every stage to `path`.

    From left to right: the images of the first stage, then for each later stage its upsampled start and its result.
    """

    def __init__(self, path: str | Path, count: int = 16, columns: int = 4) -> None:
        self.path, self.count, self.columns = Path(path), count, columns
        self._images: dict[str, list[Tensor]] = {}

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,  # noqa: ARG002
        outputs: Samples,
        *args: Any,  # noqa: ARG002
    ) -> None:
        """Collect the first `count` images."""
        if not trainer.is_global_zero:
            return
        for name, images in outputs.stages.items():
            kept = self._images.setdefault(name, [])
            kept.extend(images[: self.count - len(kept)].cpu())

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Draw the picture."""
        if self._images:
            stages = [torch.stack(images) for images in self._images.values()]
            panels = [stages[0]]
            for small, large in itertools.pairwise(stages):
                panels += [upsample_blocks(small.clamp(-1, 1), large.shape[-1] // small.shape[-1]), large]
            save_png(side_by_side([image_grid(to_uint8(panel), self.columns) for panel in panels]), self.path)
