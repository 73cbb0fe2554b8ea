"""Measures images against a reference, in one pass over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from relay_diffusion.metrics import Evaluation, Inception, Measure, ReferenceSource
from relay_diffusion.metrics.protocol import EvaluationProtocol
from relay_diffusion.models.relay import Samples


class Evaluator(Callback):
    """Feeds every image to Inception once and computes the measures at the end, over all devices.

    `reference`: what to compare with; the first device computes what is not known of it yet.
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
        self.results: dict[str, Any] = {}
        self.evaluation: Evaluation | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The reference first."""
        self.prepare(trainer, pl_module.device)

    def prepare(self, trainer: L.Trainer, device: torch.device) -> Evaluation:
        """An evaluation on the device; what is not known of the reference is computed once, on rank 0."""
        self.inception.to(device)
        first = trainer.is_global_zero
        reference = self.reference.load(self.inception, device, self.batch_size) if first else None
        trainer.strategy.barrier()
        if reference is None:  # what the first device computed is in the cache now
            reference = self.reference.load(self.inception, device, self.batch_size, show_progress=False)
        self.evaluation = Evaluation(self.inception, reference, self.measures, self.protocol).to(device)
        return self.evaluation

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

    def warnings(self, resolution: tuple[int, int]) -> list[str]:
        """What limits the numbers of images [height, width], one line each."""
        assert self.evaluation is not None
        reference, lines = self.evaluation.reference, list(self.evaluation.warnings)
        if reference.averaging not in (None, (1,)):
            factors = ", ".join(str(factor) for factor in reference.averaging)
            lines.append(f"the reference images were averaged over blocks of side {factors} to the size of the samples")
        if reference.resolution not in (None, resolution):
            sizes = [f"{height}x{width}" for height, width in (resolution, reference.resolution)]
            lines.append(f"the images are {sizes[0]}, those of the reference {sizes[1]} (height x width)")
        return lines

    def departures(self, rounding: str | None) -> list[str]:
        """Where images rounded so, or this reference, depart from the protocol; None: rounded elsewhere."""
        kept = self.reference.max_features
        return [] if self.protocol is None else self.protocol.departures(rounding, kept)

    def describe(self) -> dict[str, Any]:
        """How the numbers were obtained."""
        assert self.evaluation is not None
        return self.evaluation.describe()
