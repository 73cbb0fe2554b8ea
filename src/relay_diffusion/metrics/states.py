"""Metrics whose sums stay exact wherever their module goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric


class ExactMetric(Metric):
    """A metric whose states follow its module to another device but keep their dtype; on mps they stay on the CPU.

    A trainer with precision "bf16-true" converts every module it holds, and mps has no float64.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        device = fn(torch.empty(0, device=self.device)).device
        device = torch.device("cpu") if device.type == "mps" else device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)
