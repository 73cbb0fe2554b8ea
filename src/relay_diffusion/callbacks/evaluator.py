"""Measures sampled images against a reference set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from relay_diffusion.data.images import ImageDataset, decode_file, to_uint8, uint8_batches
from relay_diffusion.metrics import Evaluation, Inception
from relay_diffusion.metrics.evaluation import reference_statistics
from relay_diffusion.samples import ImageFolder


class Evaluator(Callback):
    """Feeds every sampled image to Inception once and computes FID and sFID at the end, over all devices.

    reference: makes the reference dataset for a resolution; its statistics are kept as .npz in `cache`.
    folder, done: images of an interrupted run that count as sampled already.
    """

    def __init__(
        self,
        inception: Inception,
        reference: Callable[..., ImageDataset],
        cache: str,
        resolution: int,
        folder: ImageFolder | None = None,
        done: Sequence[int] = (),
        batch_size: int = 64,
    ) -> None:
        self.inception, self.cache, self.batch_size = inception, Path(cache), batch_size
        self.dataset = reference(resolution=resolution)
        self.folder, self.done = folder, list(done)
        self.results: dict[str, Any] = {}
        self._evaluation: Evaluation | None = None

    @property
    def statistics_file(self) -> Path:
        """Where the reference statistics are kept."""
        return self.cache / f"{self.dataset.source_hash[:16]}.npz"

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reference statistics first (once, on rank 0), then images that an earlier run left."""
        device = pl_module.device
        self.inception.to(device)

        def statistics() -> Any:
            return reference_statistics(
                uint8_batches(self.dataset, self.batch_size),
                len(self.dataset.names),
                self.inception,
                self.dataset.source_hash,
                self.statistics_file,
                device,
            )

        if trainer.is_global_zero:
            statistics()
        trainer.strategy.barrier()
        self._evaluation = Evaluation(self.inception, statistics()).to(device)
        mine = self.done[trainer.global_rank :: trainer.world_size]
        for i in range(0, len(mine), self.batch_size):
            assert self.folder is not None
            images = [decode_file(self.folder.path(seed)) for seed in mine[i : i + self.batch_size]]
            self._evaluation.update(torch.stack(images).to(device))

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,  # noqa: ARG002
        outputs: Mapping[str, Tensor],
        *args: Any,  # noqa: ARG002
    ) -> None:
        """Count the batch's final images, as the 8-bit images that a file would hold."""
        assert self._evaluation is not None
        self._evaluation.update(to_uint8(list(outputs.values())[-1]))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Sum over the devices and compute."""
        assert self._evaluation is not None
        self.results = self._evaluation.compute()

    def describe(self) -> dict[str, Any]:
        """How the numbers were obtained."""
        return {
            "features": "Inception-2015-12-05, TensorFlow-1 bilinear resize to 299x299 of 8-bit images",
            "inception_sha256": self.inception.weights_hash,
            "reference": {
                "path": str(self.dataset.path),
                "subset": self.dataset.subset,
                "images": len(self.dataset.names),
                "resolution": self.dataset.resolution,
                "source_hash": self.dataset.source_hash,
                "statistics": str(self.statistics_file),
            },
        }
