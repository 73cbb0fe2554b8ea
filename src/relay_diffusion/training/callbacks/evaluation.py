"""Evaluate samples of the stage during training."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from relay_diffusion.data.dataset import evenly_spaced_images
from relay_diffusion.data.image_sets import evenly_spaced
from relay_diffusion.diffusion.corruption import block_mean
from relay_diffusion.diffusion.pixels import to_float, to_uint8
from relay_diffusion.metrics import Evaluator
from relay_diffusion.metrics.inception import check_channels
from relay_diffusion.models.finite_samples import NonFiniteSamplesError
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training.callbacks.periodic import PeriodicMeasurement
from relay_diffusion.training.text import text_of_images


class PeriodicEvaluation(PeriodicMeasurement):
    """Evaluate samples of the EMA weights during training.

    Every `every_n_images` and at the end; logs eval/fid and others. `count` images from the seeds 0..count-1, split
    over the ranks, in batches of `batch_size`. They have the classes, and with text one of the captions, of training
    images spaced evenly over the dataset; a relay stage starts from the block means of these images. Samples that are
    not finite are reported and not logged.
    Raises ValueError for a count or batch size out of range.
    """

    group = "eval"

    def __init__(self, evaluator: Evaluator, every_n_images: int, count: int = 5_000, batch_size: int = 64) -> None:
        for name, value, least in (("count", count, 2), ("batch_size", batch_size, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value}: must be a whole number, at least {least}")
        self.evaluator, self.count, self.batch_size = evaluator, count, batch_size
        super().__init__(every_n_images)

    def on_fit_start(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Load the reference before training, to report its errors early."""
        if self.every_n_images <= 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        check_channels(pl_module.image_channels, "callbacks=evaluated")
        self.evaluator.prepare(pl_module.device, trainer.global_rank, trainer.strategy.barrier)
        for name, reason in self.evaluator.skipped.items():
            rank_zero_warn(f"callbacks.evaluation does not measure {name}: {reason}")
        limits = [line for metric in self.evaluator.metrics.values() for line in metric.warnings(self.count)]
        for line in limits if trainer.is_global_zero else []:
            print(f"warning: callbacks.evaluation.count={self.count}: {line}", file=sys.stderr, flush=True)
        self.evaluator.cpu()  # free the memory for training

    @property
    def names(self) -> list[str]:
        """Names of the metrics."""
        return self.evaluator.names

    def measure(self, trainer: L.Trainer, stage: DiffusionStage) -> dict[str, float]:
        """Sample and compare with the reference; empty for non-finite samples."""
        evaluator = self.evaluator.to(stage.device)
        evaluator.reset()
        mine = range(self.count)[trainer.global_rank :: trainer.world_size]
        failure = None
        try:
            with stage.averaged():
                for first in range(0, len(mine), self.batch_size):
                    positions = mine[first : first + self.batch_size]
                    evaluator.update(to_uint8(self._sample(trainer, stage, positions)), torch.tensor(positions))
        except NonFiniteSamplesError as error:  # StopIfDiverged decides whether training ends
            failure = error
            print(f"warning: no evaluation at {stage.images_seen:,} images, {error}", file=sys.stderr, flush=True)
        all_finite = trainer.strategy.reduce_boolean_decision(failure is None, all=True)
        results = evaluator.compute() if all_finite else {}
        evaluator.cpu()
        return {key: value for key, value in results.items() if key != "images"}

    def _sample(self, trainer: L.Trainer, stage: DiffusionStage, seeds: Sequence[int]) -> Tensor:
        shape = (len(seeds), stage.image_channels, *stage.size)
        dataset, previous = trainer.datamodule.dataset, None  # type: ignore[attr-defined]
        chosen = evenly_spaced(self.count, len(dataset.names))
        labels = torch.tensor([dataset.labels[chosen[seed]] for seed in seeds])
        if stage.corruption.block > 1:
            images, _ = evenly_spaced_images(dataset, seeds, self.count)
            previous = block_mean(to_float(images).to(stage.device), stage.corruption.block)
        text = text_of_images(trainer, stage, dataset, seeds, self.count)
        with trainer.precision_plugin.predict_step_context():
            return stage.sample(shape, seeds, labels if stage.num_classes else None, previous, text=text)
