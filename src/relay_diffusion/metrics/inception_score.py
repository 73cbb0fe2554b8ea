"""Inception Score (Salimans et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from relay_diffusion.errors import UserError


class InceptionScore(Metric):
    """Mean over consecutive splits of exp(mean KL(p(y|x) || p(y))), in the order of the updates.

    update(logits [N,K], real): real images do not count. The last split may be smaller than `split_size`.
    Raises UserError at compute without any image.
    """

    logits: list[Tensor]

    def __init__(self, split_size: int = 5000) -> None:
        super().__init__()
        self.split_size = split_size
        self.add_state("logits", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, real: bool = False) -> None:
        """Add class logits [N,K] of generated images."""
        if not real:
            self.logits.append(logits)

    def compute(self) -> Tensor:
        """The score, a float64 scalar."""
        if not len(self.logits):
            raise UserError("the Inception Score needs at least one generated image")
        log_p = dim_zero_cat(self.logits).double().log_softmax(dim=1)
        scores = []
        for split in log_p.split(self.split_size):
            p = split.exp()
            divergence = (p * (split - p.mean(dim=0).log())).sum(dim=1)
            scores.append(divergence.mean().exp())
        return torch.stack(scores).mean()
