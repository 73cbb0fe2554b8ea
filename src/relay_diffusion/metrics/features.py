"""The features of all generated images, kept once for every measure that compares them one by one."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from relay_diffusion.metrics.states import ExactMetric


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
