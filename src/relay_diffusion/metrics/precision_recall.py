"""Improved precision and recall (Kynkaanniemi et al. 2019)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from relay_diffusion.errors import UserError

BLOCK = 4096  # rows of the distance matrix at once: memory does not grow with the square of the images


class PrecisionAndRecall(NamedTuple):
    """Shares in 0..1: of generated images among the real ones, and of real images among the generated ones."""

    precision: Tensor
    recall: Tensor


def _radii(features: Tensor, nearest_k: int) -> Tensor:
    """Distance [N] of each row of features [N,D] to its k-th nearest other row."""
    return torch.cat([torch.cdist(rows, features).kthvalue(nearest_k + 1).values for rows in features.split(BLOCK)])


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Share of points [N,D] that lie within the radius [M] of any of the centres [M,D]."""
    inside = [(torch.cdist(rows, centres) <= radii).any(dim=1) for rows in points.split(BLOCK)]
    return torch.cat(inside).double().mean()


class PrecisionRecall(Metric):
    """Precision and recall: a point is covered if it lies within the k-th neighbour radius of a point of the other set.

    It keeps the features of both sets. update(features [N,D], real); compute() -> PrecisionAndRecall.
    Raises UserError at compute if a set has no more than nearest_k images.
    """

    real: list[Tensor]
    fake: list[Tensor]

    def __init__(self, nearest_k: int = 3) -> None:
        super().__init__()
        self.nearest_k = nearest_k
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("fake", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        """Add features [N,D] of real or generated images."""
        (self.real if real else self.fake).append(features)

    def compute(self) -> PrecisionAndRecall:
        """Both shares, float64 scalars."""
        sets = []
        for name, parts in (("real", self.real), ("generated", self.fake)):
            features = dim_zero_cat(parts) if len(parts) else torch.empty(0, 1)
            if len(features) <= self.nearest_k:
                raise UserError(f"precision and recall need more than {self.nearest_k} {name} images")
            sets.append(features)
        real, fake = sets
        precision = _share_inside(fake, real, _radii(real, self.nearest_k))
        return PrecisionAndRecall(precision, _share_inside(real, fake, _radii(fake, self.nearest_k)))
