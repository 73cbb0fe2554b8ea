"""Draw the start and the result of every stage."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from relay_diffusion.diffusion.corruption import upsample_blocks
from relay_diffusion.diffusion.pixels import to_uint8
from relay_diffusion.models.relay import Samples
from relay_diffusion.utils.messages import shorten
from relay_diffusion.utils.pictures import SHOWN_SIDE, image_grid, save_png, side_by_side, titled


class RelayPicture(Callback):
    """Draw the first `count` samples of every stage to `path`.

    Columns with titles: the images of the first stage, then for each later stage its upsampled start and its result.
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
            stages = {name: torch.stack(images) for name, images in self._images.items()}
            first, *_ = stages
            panels = [self._panel(f"{first}: {_size(stages[first])}", stages[first])]
            for (_, small), (name, large) in itertools.pairwise(stages.items()):
                start = upsample_blocks(small.clamp(-1, 1), large.shape[-1] // small.shape[-1])
                panels += [self._panel(f"{name}: start", start), self._panel(f"{name}: {_size(large)}", large)]
            save_png(side_by_side(panels), self.path)

    def _panel(self, title: str, images: Tensor) -> Image.Image:
        return titled(image_grid(to_uint8(images), self.columns, least_side=SHOWN_SIDE), shorten(title, 40))


def _size(images: Tensor) -> str:
    return f"{images.shape[-1]}x{images.shape[-2]}"
