"""Inception Score (Salimans et al., arXiv 1606.03498)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from relay_diffusion.errors import UserError
from relay_diffusion.metrics.base import ExactMetric, ImageMetric
from relay_diffusion.metrics.inception import Inception, InceptionFeatures
from relay_diffusion.metrics.reference import Reference


class InceptionScore(ExactMetric):
    """Mean over splits of exp(mean KL(p(y|x) || p(y))).

    A split is `split_size` consecutive images. Only sums are kept, one row of K + 2 float64 numbers per split: sum of p
    [K], sum of p log p, number of images, for mean KL = mean(sum_k p log p) - sum_k mean(p) log mean(p). As in ADM's
    evaluator the last split may be smaller and has the same weight as the others.
    """

    higher_is_better = True

    splits: list[Tensor]
    sums: list[Tensor]

    def __init__(self, split_size: int = 5000) -> None:
        super().__init__()
        if split_size < 1:
            raise UserError(f"split_size={split_size}: must be at least 1 image")
        self.split_size = split_size
        self.add_state("splits", default=[], dist_reduce_fx="cat")
        self.add_state("sums", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, real: bool = False, positions: Tensor | None = None) -> None:
        """Add class logits [N,K] of generated images; ignore real images.

        positions [N]: indices in the ordered list of all images; they determine the splits. None: the images follow the
        previous ones, which is valid in a single process only.
        """
        if real:
            return
        if positions is None:
            done = int(self.sums[0][:, -1].sum()) if len(self.sums) else 0
            positions = done + torch.arange(len(logits))
        log_p = logits.detach().to(self.device).double().log_softmax(dim=1)
        p = log_p.exp()
        rows = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], dim=1)
        splits = positions.to(self.device) // self.split_size
        # One tensor in each list, so that ranks without images also have one to gather.
        merged, sums = _merge(torch.cat([*self.splits, splits]), torch.cat([*self.sums, rows]))
        self.splits, self.sums = [merged], [sums]

    def compute(self) -> Tensor:
        """Return the score over all ranks, a float64 scalar. Raises UserError without images."""
        if not sum(len(part) for part in self.sums):
            raise UserError("the Inception Score needs at least one generated image")
        _, sums = _merge(dim_zero_cat(self.splits), dim_zero_cat(self.sums))
        means = sums[:, :-1] / sums[:, -1:]
        entropy = torch.special.entr(means[:, :-1]).sum(1)
        return (means[:, -1] + entropy).exp().mean()


def _merge(splits: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the rows of each split: [R], [R,C] -> [S] ascending, [S,C]."""
    found, group = splits.unique(return_inverse=True)
    return found, sums.new_zeros(len(found), sums.shape[1]).index_add_(0, group, sums)


class InceptionScoreMetric(ImageMetric):
    """Inception Score in ordered splits (ADM evaluator: 5,000 images each)."""

    names = ("inception_score",)

    def __init__(self, split_size: int = 5000) -> None:
        super().__init__()
        self.score = InceptionScore(split_size)

    def prepare(self, reference: Reference, inception: Inception) -> str | None:  # noqa: ARG002
        """Require a class layer in the Inception weights."""
        if not inception.has_classes:
            return (
                "these Inception weights have no class layer; "
                "set metrics.evaluator.inception.weights to a pt_inception-2015-12-05-*.pth file"
            )
        return None

    def update(self, features: InceptionFeatures, positions: Tensor) -> None:
        """Add generated images."""
        assert features.logits is not None, "checked in prepare"
        self.score.update(features.logits, positions=positions)

    def compute(self, features: Tensor) -> dict[str, float]:  # noqa: ARG002
        """Return {"inception_score"}. Raises UserError without images."""
        return {"inception_score": float(self.score.compute())}

    def describe(self) -> dict[str, Any]:
        """Return the size of a split."""
        return {"split_size": self.score.split_size}
