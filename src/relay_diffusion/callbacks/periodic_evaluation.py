"""How good the stage's samples are, while it trains."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from relay_diffusion.callbacks.ema import averaged
from relay_diffusion.callbacks.evaluator import Evaluator
from relay_diffusion.callbacks.every import Every
from relay_diffusion.callbacks.preemption import preempted
from relay_diffusion.callbacks.sample_grid import spread_images
from relay_diffusion.callbacks.training_log import not_training
from relay_diffusion.data.image_sets import spread
from relay_diffusion.data.images import to_float, to_uint8
from relay_diffusion.diffusion.corruption import block_mean
from relay_diffusion.errors import UserError
from relay_diffusion.finite_samples import NonFiniteSamplesError
from relay_diffusion.loggers import last_step, send_row
from relay_diffusion.metrics import Evaluation
from relay_diffusion.stage import DiffusionStage


class PeriodicEvaluation(Callback):
    """Measures samples with the averaged weights, every `every_n_images` and at the end; logs eval/fid and so on.

    `count` images from the seeds 0..count-1, dealt out to the devices, `batch_size` at once, with the classes of
    training images that are spread over the set; a relay stage starts from the block means of these images. Training
    goes on as if it were not there. If samples are not finite, that is reported and nothing is logged. An amount of
    images that was measured before the run was continued is not measured again. Raises UserError where the numbers make
    no sense.
    """

    def __init__(self, evaluator: Evaluator, every_n_images: int, count: int = 5_000, batch_size: int = 64) -> None:
        for name, value, least in (("count", count, 2), ("batch_size", batch_size, 1)):
            if not isinstance(value, int) or value < least:
                raise UserError(f"callbacks.evaluation.{name}={value}: must be a whole number, at least {least}")
        self.evaluator, self.count, self.batch_size = evaluator, count, batch_size
        self._every = Every(every_n_images)
        self._measured = -1
        self._evaluation: Evaluation | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Get the reference before training starts, so that nobody waits long for a mistake in it."""
        if self._every.images <= 0:
            return
        self._evaluation = self.evaluator.prepare(trainer, pl_module.device)
        for name, reason in self._evaluation.skipped.items():
            rank_zero_warn(f"callbacks.evaluation does not measure {name}: {reason}")
        limits = [line for measure in self._evaluation.measures.values() for line in measure.warnings(self.count)]
        for line in limits if trainer.is_global_zero else []:
            print(f"warning: callbacks.evaluation.count={self.count}: {line}", file=sys.stderr, flush=True)
        self._evaluation.cpu()  # training needs the memory

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from where training starts."""
        assert isinstance(pl_module, DiffusionStage)
        self._every.start(pl_module.images_seen)
        self._measured = trainer.strategy.broadcast(last_step(trainer.loggers, "eval"))  # the same on all devices

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:  # noqa: ARG002
        """Measure when due."""
        assert isinstance(pl_module, DiffusionStage)
        if self._every(pl_module.images_seen):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the end of training, unless that was just done."""
        assert isinstance(pl_module, DiffusionStage)
        if self._every.images > 0 and not preempted(trainer):
            self._measure(trainer, pl_module)

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, stage: DiffusionStage) -> None:
        if stage.images_seen <= self._measured:
            return
        self._measured = stage.images_seen
        with not_training(trainer):
            results = self._results(trainer, stage)
        if results is not None:
            send_row(trainer.loggers, "eval", results, stage.images_seen)

    def _results(self, trainer: L.Trainer, stage: DiffusionStage) -> dict[str, float] | None:
        """The numbers; None, and a warning, if the samples of any device are not finite. Collective."""
        assert self._evaluation is not None
        evaluation = self._evaluation.to(stage.device)
        evaluation.reset()
        mine = range(self.count)[trainer.global_rank :: trainer.world_size]
        failure = None
        try:
            with averaged(trainer, stage):
                for first in range(0, len(mine), self.batch_size):
                    positions = mine[first : first + self.batch_size]
                    evaluation.update(to_uint8(self._sample(trainer, stage, positions)), torch.tensor(positions))
        except NonFiniteSamplesError as error:  # training goes on: its own checks decide whether it has diverged
            failure = error
            print(f"warning: no evaluation at {stage.images_seen:,} images, {error}", file=sys.stderr, flush=True)
        all_finite = trainer.strategy.reduce_boolean_decision(failure is None, all=True)
        results = evaluation.compute() if all_finite else None
        evaluation.cpu()
        if results is None:
            return None
        return {key: value for key, value in results.items() if key != "images"}

    def _sample(self, trainer: L.Trainer, stage: DiffusionStage, seeds: Sequence[int]) -> Tensor:
        shape = (len(seeds), stage.image_channels, stage.resolution, stage.resolution)
        dataset, previous = trainer.datamodule.dataset, None  # type: ignore[attr-defined]
        chosen = spread(self.count, len(dataset.names))
        labels = torch.tensor([dataset.labels[chosen[seed]] for seed in seeds])
        if stage.corruption.block > 1:
            images, _ = spread_images(dataset, seeds, self.count)
            previous = block_mean(to_float(images).to(stage.device), stage.corruption.block)
        with trainer.precision_plugin.predict_step_context():
            return stage.sample(shape, seeds, labels if stage.num_classes else None, previous)
