"""Evaluate generated images with one Inception pass for all metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from relay_diffusion.errors import require
from relay_diffusion.metrics.base import FeatureStore, ImageMetric
from relay_diffusion.metrics.inception import Inception
from relay_diffusion.metrics.protocol import Protocol
from relay_diffusion.metrics.reference import Reference
from relay_diffusion.metrics.reference_source import ReferenceSource
from relay_diffusion.utils.messages import one_line
from relay_diffusion.utils.signatures import check_arguments

CALLS: Mapping[str, tuple[str, ...]] = {  # methods of metrics and their arguments
    "prepare": ("reference", "inception"),
    "update": ("features", "positions"),
    "compute": ("features",),
    "warnings": ("images",),
    "describe": (),
}


class _FeaturesNotKept(Tensor):
    """Placeholder that raises TypeError if a metric uses it."""

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise TypeError(
            "compute uses features, which are not kept: set keeps_features = True in the class of the metric"
        )


class Evaluator(nn.Module):
    """Compare generated uint8 images [B,C,H,W] with a reference.

    metrics: by name. reference: loaded, or a source that `prepare` loads with Inception batches of `batch_size` images.
    Each rank updates with its own images; `compute` then returns the results of all images on every rank. They do not
    depend on the number of ranks, the batches or their order. `skipped`: by name, the reason why a metric was not
    computed. `warnings`: limitations of the results, one line each. Raises UserError for a setting that contradicts the
    protocol, ValueError for two metrics of one name.
    """

    def __init__(
        self,
        inception: Inception,
        reference: Reference | ReferenceSource,
        metrics: Mapping[str, ImageMetric],
        protocol: Protocol | None = None,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        for name, metric in metrics.items():
            keys = getattr(metric, "names", None)
            require(
                isinstance(metric, ImageMetric) and isinstance(keys, tuple | list),
                f"metrics.evaluator.metrics.{name}: {type(metric).__name__} must be a subclass of "
                'relay_diffusion.metrics.ImageMetric with the keys of its results, e.g. names = ("fid",)',
            )
            for method, arguments in CALLS.items():
                where = f"metrics.evaluator.metrics.{name}: {type(metric).__name__}.{method}"
                check_arguments(where, getattr(metric, method), arguments)
        self.inception, self.protocol, self.batch_size = inception, protocol, batch_size
        self._by_name, self._modules_by_name = dict(metrics), nn.ModuleList(metrics.values())
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"metrics: two have the same name ({', '.join(self.names)}); rename one")
        if protocol is not None:
            for name, metric in metrics.items():
                protocol.check(metric.describe(), f"metrics.evaluator.metrics.{name}")
        self._store = FeatureStore(any(metric.keeps_features for metric in metrics.values()))
        self.source = reference if isinstance(reference, ReferenceSource) else None
        if isinstance(reference, Reference):
            self._compare_with(reference)

    def prepare(self, device: torch.device, rank: int = 0, barrier: Callable[[], object] = lambda: None) -> None:
        """Load the reference and move to `device`; collective.

        Rank 0 computes missing statistics; the other ranks read them from the cache after the barrier.
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
        reasons = {name: metric.prepare(reference, self.inception) for name, metric in self._by_name.items()}
        self._unavailable = {name: reason for name, reason in reasons.items() if reason is not None}
        self.skipped, self.warnings = dict(self._unavailable), list[str]()

    @property
    def names(self) -> list[str]:
        """Return the keys of the results of all metrics."""
        return [key for metric in self._by_name.values() for key in metric.names]

    @property
    def metrics(self) -> dict[str, ImageMetric]:
        """Return the metrics that the reference and the Inception weights allow."""
        return {name: metric for name, metric in self._by_name.items() if name not in self._unavailable}

    def update(self, images: Tensor, positions: Tensor) -> None:
        """Add generated images.

        positions [B], int64: indices in the ordered list of all images; over all ranks 0..N-1, each once.
        """
        if positions.shape != images.shape[:1] or positions.dtype != torch.int64:
            raise ValueError(f"positions: need {len(images)} int64 values, one per image, not {list(positions.shape)}")
        features = self.inception(images)
        for metric in self.metrics.values():
            metric.update(features, positions)
        self._store.update(features.pool, positions)

    def compute(self) -> dict[str, float | int]:
        """Return the results of every metric and "images"; collective.

        A metric that raises ValueError, e.g. for too few images, is added to `skipped`. Raises ValueError if positions
        are missing or repeated, UserError for a result that is not a dict or has a key that the metric does not name,
        TypeError for a metric that uses the features without `keeps_features`.
        """
        # An empty update gives a rank without images states of the right shapes.
        nothing = torch.zeros(0, 3, 32, 32, dtype=torch.uint8, device=self.inception.device)
        self.update(nothing, torch.zeros(0, dtype=torch.int64))
        images, features = self._store.compute()
        unavailable = torch.empty(0, 0).as_subclass(_FeaturesNotKept)
        self.skipped, self.warnings = dict(self._unavailable), []
        results: dict[str, float | int] = {}
        for name, metric in self.metrics.items():
            try:
                found = metric.compute(features if metric.keeps_features else unavailable)
                limitations = metric.warnings(images)
            except ValueError as error:
                self.skipped[name] = one_line(error)
                continue
            require(
                isinstance(found, Mapping),
                f"metrics.evaluator.metrics.{name}: compute returned a {type(found).__name__}; it must return a dict "
                f"of numbers with the keys {', '.join(metric.names)}",
            )
            unknown = ", ".join(found.keys() - {*metric.names})
            require(
                not unknown,
                f"metrics.evaluator.metrics.{name}: compute returned {unknown}, which is not one of its names "
                f"({', '.join(metric.names)}); add it to names",
            )
            results |= {key: float(value) for key, value in found.items()}
            self.warnings += limitations
        return results | {"images": images}

    def reset(self) -> None:
        """Remove the generated images; keep the reference."""
        self.skipped, self.warnings = dict(self._unavailable), []
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def reference_warnings(self, resolution: tuple[int, int]) -> list[str]:
        """Return one line per difference of the reference from images [height, width]."""
        reference, lines = self.reference, []
        if reference.averaging not in (None, (1,)):
            factors = ", ".join(str(factor) for factor in reference.averaging)
            lines.append(f"the reference images were averaged over blocks of side {factors} to the size of the samples")
        if reference.resolution not in (None, resolution):
            sizes = [f"{height}x{width}" for height, width in (resolution, reference.resolution)]
            lines.append(f"the images are {sizes[0]}, those of the reference {sizes[1]} (height x width)")
        return lines

    def departures(self, rounding: str | None) -> list[str]:
        """Return the departures of images and reference from the protocol.

        rounding: of the images to 8 bits; None: unknown.
        """
        if self.protocol is None or self.source is None:
            return []
        return self.protocol.departures(rounding, self.source.max_features)

    def describe(self) -> dict[str, Any]:
        """Return the settings of the evaluation."""
        return {
            "protocol": self.protocol.describe() if self.protocol is not None else None,
            "metrics": {name: metric.describe() for name, metric in self.metrics.items()},
            "skipped": dict(self.skipped),
            "inception_sha256": self.inception.weights_hash,
            "reference": self.reference.describe(),
        }
