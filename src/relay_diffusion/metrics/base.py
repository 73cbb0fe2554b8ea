"""What every measure of generated images has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Module
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from relay_diffusion.metrics.inception import Inception, InceptionFeatures
from relay_diffusion.metrics.reference import Reference


class Measure(nn.Module, ABC):
    """One way to say how good generated images are; `Evaluator` feeds it the Inception features of each of them once.

    names: the keys of what `compute` gives. keeps_features: it needs the pool features of all generated images at
    the end; `Evaluator` keeps them once for all measures. Its metrics are torchmetrics, which sum over the ranks.
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


class ExactMetric(Metric):
    """A metric whose states follow its module to another device but keep their dtype; on mps they stay on the CPU.

    A trainer with precision "bf16-true" converts every module it holds, and mps has no float64.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        device = fn(torch.empty(0, device=self.device)).device
        device = torch.device("cpu") if device.type == "mps" else device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)


class FeatureBank(ExactMetric):
    """Features [N,D] of all ranks in the order of their positions, in the dtype they came in (float32: 8 KB an image).

    In one order the results do not depend on batches and ranks. A rank without images needs an update with [0,D].
    """

    rows: list[Tensor]
    positions: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.add_state("positions", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, positions: Tensor) -> None:
        """Keep features [B,D] at positions [B] of the ordered list of all images."""
        for kept, new in ((self.rows, features.detach()), (self.positions, positions)):
            # A copy: a slice would keep alive all that it is a slice of.
            kept.append(new.to(self.device).clone(memory_format=torch.contiguous_format))

    def compute(self) -> Tensor:
        """All of them [N,D], in order."""
        rows = dim_zero_cat(self.rows)
        return rows[torch.argsort(dim_zero_cat(self.positions))]
