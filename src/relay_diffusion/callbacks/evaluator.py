"""Measures images against a reference, in one pass over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from relay_diffusion.metrics import Evaluation, Inception, Measure, ReferenceSource
from relay_diffusion.metrics.protocol import EvaluationProtocol
from relay_diffusion.relay import Samples

Positioned = Iterable[tuple[Tensor, Tensor]]  # (positions [B], images uint8 [B,3,H,W])


class Evaluator(Callback):
    """Feeds every image to Inception once and computes the measures at the end, over all devices.

    `reference`: what to compare with; the first device computes what is not known of it yet. `done`: gives the
    (positions, images) of this device, from (rank, devices), that an interrupted run left.
    """

    def __init__(
        self,
        inception: Inception,
        reference: ReferenceSource,
        measures: Mapping[str, Measure],
        protocol: EvaluationProtocol | None = None,
        batch_size: int = 64,
    ) -> None:
        self.inception, self.reference = inception, reference
        self.measures, self.protocol, self.batch_size = measures, protocol, batch_size
        self.done: Callable[[int, int], Positioned] | None = None
        self.results: dict[str, Any] = {}
        self.evaluation: Evaluation | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The reference first (once, on rank 0), then images that an earlier run left."""
        device = pl_module.device
        self.inception.to(device)
        if trainer.is_global_zero:
            self.reference.load(self.inception, device, self.batch_size)
        trainer.strategy.barrier()
        reference = self.reference.load(self.inception, device, self.batch_size, show_progress=False)
        self.evaluation = Evaluation(self.inception, reference, self.measures, self.protocol).to(device)
        if self.done is not None:
            for positions, images in self.done(trainer.global_rank, trainer.world_size):
                self.evaluation.update(images.to(device), positions)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,  # noqa: ARG002
        outputs: Samples,
        *args: Any,  # noqa: ARG002
    ) -> None:
        """Count the batch's final images."""
        assert self.evaluation is not None
        self.evaluation.update(outputs.images, outputs.positions)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Sum over the devices and compute."""
        assert self.evaluation is not None
        self.results = self.evaluation.compute()

    @property
    def skipped(self) -> dict[str, str]:
        """What could not be measured, and why."""
        return self.evaluation.skipped if self.evaluation is not None else {}

    def describe(self) -> dict[str, Any]:
        """How the numbers were obtained."""
        assert self.evaluation is not None
        return self.evaluation.describe()
