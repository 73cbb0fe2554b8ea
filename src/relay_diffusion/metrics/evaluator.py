"""Evaluation of generated images: any number of measures from one Inception pass per image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.utilities.data import dim_zero_cat

from relay_diffusion.errors import UserError
from relay_diffusion.metrics.base import ExactMetric, FeatureBank, Measure
from relay_diffusion.metrics.inception import Inception
from relay_diffusion.metrics.protocol import EvaluationProtocol
from relay_diffusion.metrics.reference import Reference
from relay_diffusion.metrics.reference_source import ReferenceSource


class Evaluator(nn.Module):
    """Compare generated uint8 images [B,3,H,W] with a reference; `measures` are by name.

    reference: loaded, or a source that `prepare` loads with Inception batches of `batch_size`. On several ranks each
    one updates with its own images; `compute` then answers for all of them, on every rank, and independently of the
    number of ranks, the batches and their order. `skipped`: by name, why a measure has no number. `warnings`: the
    limits of the numbers, one line each.
    """

    def __init__(
        self,
        inception: Inception,
        reference: Reference | ReferenceSource,
        measures: Mapping[str, Measure],
        protocol: EvaluationProtocol | None = None,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.inception, self.protocol, self.batch_size = inception, protocol, batch_size
        self.source = reference if isinstance(reference, ReferenceSource) else None
        self._given = dict(measures)
        if isinstance(reference, Reference):
            self._compare_with(reference)

    def prepare(self, device: torch.device, rank: int = 0, barrier: Callable[[], object] = lambda: None) -> None:
        """Load the reference and move to `device`; collective.

        Rank 0 computes what the cache lacks, and the other ranks read it after the barrier. Raises UserError for a
        setting that contradicts the protocol, ValueError for two measures of one number.
        """
        assert self.source is not None, "the reference is loaded"
        self.inception.to(device)
        reference = self.source.load(self.inception, device, self.batch_size) if rank == 0 else None
        barrier()
        if reference is None:
            reference = self.source.load(self.inception, device, self.batch_size, show_progress=False)
        self._compare_with(reference)
        self.to(device)

    def _compare_with(self, reference: Reference) -> None:
        self.reference = reference
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"two measures give the same number: {', '.join(self.names)}")
        self._unprepared: dict[str, str] = {}
        ready: dict[str, Measure] = {}
        for name, measure in self._given.items():
            if self.protocol is not None:
                self.protocol.check(measure.describe(), f"metrics.evaluator.measures.{name}")
            reason = measure.prepare(reference, self.inception)
            if reason is None:
                ready[name] = measure
            else:
                self._unprepared[name] = reason
        self.skipped = dict(self._unprepared)
        self.warnings: list[str] = []
        self._ready = list(ready)
        self._measures = nn.ModuleList(ready.values())  # not a ModuleDict: its keys could not be any name
        self._count = _Positions()
        self._bank = FeatureBank() if any(measure.keeps_features for measure in ready.values()) else None

    @property
    def names(self) -> list[str]:
        """Return the keys of the numbers of all measures."""
        return [key for measure in self._given.values() for key in measure.names]

    @property
    def measures(self) -> dict[str, Measure]:
        """Return the measures that the reference and Inception suffice for."""
        return dict(zip(self._ready, self._measures, strict=True))  # type: ignore[arg-type]

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

    def reference_warnings(self, resolution: tuple[int, int]) -> list[str]:
        """Return one line for each way in which the reference differs from images [height, width]."""
        reference, lines = self.reference, []
        if reference.averaging not in (None, (1,)):
            factors = ", ".join(str(factor) for factor in reference.averaging)
            lines.append(f"the reference images were averaged over blocks of side {factors} to the size of the samples")
        if reference.resolution not in (None, resolution):
            sizes = [f"{height}x{width}" for height, width in (resolution, reference.resolution)]
            lines.append(f"the images are {sizes[0]}, those of the reference {sizes[1]} (height x width)")
        return lines

    def departures(self, rounding: str | None) -> list[str]:
        """Return where the rounding of the images (None: unknown) or the reference departs from the protocol."""
        if self.protocol is None or self.source is None:
            return []
        return self.protocol.departures(rounding, self.source.max_features)

    def describe(self) -> dict[str, Any]:
        """Return how the numbers are obtained."""
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
