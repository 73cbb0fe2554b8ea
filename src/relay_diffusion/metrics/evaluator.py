"""Evaluation of generated images: any number of measures from one Inception pass per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.utilities.data import dim_zero_cat

from relay_diffusion.errors import UserError
from relay_diffusion.metrics.base import ExactMetric, FeatureBank, Measure
from relay_diffusion.metrics.inception import Inception
from relay_diffusion.metrics.protocol import EvaluationProtocol
from relay_diffusion.metrics.reference import Reference


class Evaluation(nn.Module):
    """Measures generated uint8 images [B,3,H,W] against a reference; `measures` are by name.

    On several ranks each one feeds its own images; `compute` then answers for all of them, on every rank, and the same
    whatever the ranks, the batches and the order of arrival. `skipped` says by name why a measure has no number, and
    `warnings` what limits the numbers that there are. Raises UserError for a setting that contradicts the protocol, and
    ValueError for two measures of one number.
    """

    def __init__(
        self,
        inception: Inception,
        reference: Reference,
        measures: Mapping[str, Measure],
        protocol: EvaluationProtocol | None = None,
    ) -> None:
        super().__init__()
        self.inception, self.reference, self.protocol = inception, reference, protocol
        keys = [key for measure in measures.values() for key in measure.names]
        if len(set(keys)) < len(keys):
            raise ValueError(f"two measures give the same number: {', '.join(keys)}")
        self._unprepared: dict[str, str] = {}
        ready: dict[str, Measure] = {}
        for name, measure in measures.items():
            if protocol is not None:
                protocol.check(measure.describe(), f"metrics.evaluator.measures.{name}")
            reason = measure.prepare(reference, inception)
            if reason is None:
                ready[name] = measure
            else:
                self._unprepared[name] = reason
        self.skipped = dict(self._unprepared)
        self.warnings: list[str] = []
        self._names = list(ready)
        self._measures = nn.ModuleList(ready.values())  # not a ModuleDict: its keys could not be any name
        self._count = _Positions()
        self._bank = FeatureBank() if any(measure.keeps_features for measure in ready.values()) else None

    @property
    def measures(self) -> dict[str, Measure]:
        """The measures that have all they need."""
        return dict(zip(self._names, self._measures, strict=True))  # type: ignore[arg-type]

    def update(self, images: Tensor, positions: Tensor) -> None:
        """Add generated images; positions [B] (int64) are their places in the ordered list of all of them.

        Over all ranks the positions must be 0..N-1, each once.
        """
        if positions.shape != images.shape[:1] or positions.dtype != torch.int64:
            raise ValueError(f"{len(images)} images need as many int64 positions, not {list(positions.shape)}")
        features = self.inception(images)
        for measure in self.measures.values():
            measure.update(features, positions)
        if self._bank is not None:
            self._bank.update(features.pool, positions)
        self._count.update(positions)

    def compute(self) -> dict[str, float | int]:
        """The numbers of every measure and "images", over all ranks; each rank must call it, also one without images.

        A measure that needs more images than there are goes to `skipped`. Raises ValueError if positions are missing
        or come twice.
        """
        device = self._count.device
        # So that a rank without images has states of the right shapes, and takes part in every sum.
        self.update(torch.zeros(0, 3, 32, 32, dtype=torch.uint8, device=device), torch.zeros(0, dtype=torch.int64))
        images = self._count.compute()
        features = self._bank.compute() if self._bank is not None else torch.empty(0, 0)
        self.skipped = dict(self._unprepared)
        results: dict[str, float | int] = {}
        for name, measure in self.measures.items():
            try:
                results |= measure.compute(features)
            except UserError as error:
                self.skipped[name] = str(error)
        measured = [measure for name, measure in self.measures.items() if name not in self.skipped]
        self.warnings = [line for measure in measured for line in measure.warnings(images)]
        return results | {"images": images}

    def reset(self) -> None:
        """Forget the generated images; the reference stays."""
        self.skipped, self.warnings = dict(self._unprepared), []
        for part in (*self.measures.values(), self._count, self._bank):
            if part is not None:
                part.reset()

    def describe(self) -> dict[str, Any]:
        """How the numbers are obtained."""
        return {
            "protocol": self.protocol.describe() if self.protocol is not None else None,
            "measures": {name: measure.describe() for name, measure in self.measures.items()},
            "skipped": dict(self.skipped),
            "inception_sha256": self.inception.weights_hash,
            "reference": self.reference.describe(),
        }


class _Positions(ExactMetric):
    """Counts the images and proves that each was counted once: 8 bytes an image."""

    positions: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("positions", default=[], dist_reduce_fx="cat")

    def update(self, positions: Tensor) -> None:
        self.positions.append(positions.to(self.device).clone())

    def compute(self) -> int:
        found = dim_zero_cat(self.positions).sort().values
        count = len(found)
        if not torch.equal(found, torch.arange(count, device=found.device)):
            raise ValueError(f"the positions of {count} images are not 0..{count - 1}, each once")
        return count
