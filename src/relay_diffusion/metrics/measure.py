"""What every measure of generated images has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import Metric

from relay_diffusion.metrics.inception import Inception, InceptionFeatures
from relay_diffusion.metrics.reference import Reference


class Measure(nn.Module, ABC):
    """One way to say how good generated images are; `Evaluation` feeds it the Inception features of each of them once.

    names: the keys of what `compute` gives. keeps_features: it needs the pool features of all generated images at
    the end; `Evaluation` keeps them once for all measures. Its metrics are torchmetrics, which sum over the ranks.
    """

    names: ClassVar[tuple[str, ...]]
    keeps_features: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, reference: Reference, inception: Inception) -> str | None:
        """Get ready to compare with `reference`; else one line that says why it cannot be measured."""

    def update(self, features: InceptionFeatures, positions: Tensor) -> None:
        """Add generated images; positions [B] (int64) are their places in the ordered list of all of them."""

    @abstractmethod
    def compute(self, features: Tensor) -> dict[str, float]:
        """The numbers over all ranks, on every rank; UserError where there are too few images.

        features: pool features [N,D] of all generated images in order, if it keeps_features.
        """

    def warnings(self, images: int) -> list[str]:  # noqa: ARG002
        """One line for each limit of the numbers of so many generated images."""
        return []

    def reset(self) -> None:
        """Forget the generated images; the reference stays."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def describe(self) -> dict[str, Any]:
        """The settings that its numbers depend on."""
        return {}
