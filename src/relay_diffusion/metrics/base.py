"""Base classes of the metrics of generated images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from relay_diffusion.metrics.inception import Inception, InceptionFeatures
from relay_diffusion.metrics.reference import Reference


class ImageMetric(nn.Module, ABC):
    """Metric of generated images, computed from Inception features.

    names: keys of the result of `compute`. keeps_features: `compute` needs the pool features of all generated images;
    `Evaluator` keeps one copy for all metrics. Accumulate in torchmetrics: they sum over ranks, and `Evaluator` resets
    them.
    """

    names: ClassVar[tuple[str, ...]]
    keeps_features: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, reference: Reference, inception: Inception) -> str | None:
        """Prepare for `reference`, or return why this metric cannot be computed."""

    def update(self, features: InceptionFeatures, positions: Tensor) -> None:
        """Add generated images.

        positions [B], int64: indices in the ordered list of all images.
        """

    @abstractmethod
    def compute(self, features: Tensor) -> dict[str, float]:
        """Return the results over all ranks, on every rank.

        features: pool features [N,D] of all generated images in order, if keeps_features. Raises ValueError for too few
        images.
        """

    def warnings(self, images: int) -> list[str]:  # noqa: ARG002
        """Return one line per limitation of results from `images` generated images."""
        return []

    def describe(self) -> dict[str, Any]:
        """Return the settings that the results depend on."""
        return {}


class FeatureMetric(ImageMetric):
    """Metric on pool features of all generated images and the reference.

    min_images: smallest number of reference images.
    """

    keeps_features = True
    min_images: int = 1

    def prepare(self, reference: Reference, inception: Inception) -> str | None:  # noqa: ARG002
        """Require features of at least min_images reference images."""
        if reference.features is None:
            return f"the reference {reference.path} holds statistics only, no images"
        if len(reference.features) < self.min_images:
            return f"needs {self.min_images} reference images, and {reference.path} has {len(reference.features)}"
        self.real = reference.features
        return None


class ExactMetric(Metric):
    """torchmetrics Metric whose states keep their dtype.

    A program that converts its modules to bfloat16 would otherwise convert the states too. mps has no float64, so there
    the states stay on the CPU.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        device = fn(torch.empty(0, device=self.device)).device
        device = torch.device("cpu") if device.type == "mps" else device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)


class FeatureStore(ExactMetric):
    """Positions and features [N,D] of the images of all ranks.

    A position takes 8 bytes per image. Features are kept if `keeps_features`, in their dtype (float32: 8 KB per image);
    their order depends on neither batches nor ranks. A rank without images needs an update with [0,D].
    """

    positions: list[Tensor]
    features: list[Tensor]

    def __init__(self, keeps_features: bool) -> None:
        super().__init__()
        self.keeps_features = keeps_features
        self.add_state("positions", default=[], dist_reduce_fx="cat")
        if keeps_features:
            self.add_state("features", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, positions: Tensor) -> None:
        """Add features [B,D] at positions [B] in the list of all images."""
        # Copies: a slice would keep the whole tensor alive.
        self.positions.append(positions.to(self.device).clone())
        if self.keeps_features:
            copy = features.detach().to(self.device).clone(memory_format=torch.contiguous_format)
            self.features.append(copy)

    def compute(self) -> tuple[int, Tensor]:
        """Return the number of images N and the features [N,D].

        The features are in order; [0,0] if they are not kept. Raises ValueError unless the positions are 0..N-1, each
        once.
        """
        positions, order = dim_zero_cat(self.positions).sort()
        count = len(positions)
        if not torch.equal(positions, torch.arange(count, device=positions.device)):
            raise ValueError(f"the positions of {count} images are not 0..{count - 1}, each once")
        return count, dim_zero_cat(self.features)[order] if self.keeps_features else torch.empty(0, 0)
