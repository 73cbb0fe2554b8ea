"""Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from relay_diffusion.errors import UserError
from relay_diffusion.metrics.base import FeatureMetric
from relay_diffusion.metrics.neighbours import covered, squared_radii


class PrecisionAndRecall(NamedTuple):
    """Precision and recall, each in 0..1.

    precision: share of generated images within the real set. recall: share of real images within the generated set.
    """

    precision: Tensor
    recall: Tensor


def precision_recall(real: Tensor, fake: Tensor, nearest_k: int) -> PrecisionAndRecall:
    """Compute the shares of points within k-th neighbor radii.

    The radii are those of the points of the other set.
    Features [M,D] and [N,D] on one device; float64 scalars. Raises UserError for a set of no more than nearest_k
    images.
    """
    for name, features in (("real", real), ("generated", fake)):
        if len(features) <= nearest_k:
            raise UserError(
                f"precision and recall need more than {nearest_k} {name} images, not {len(features)}; give more"
            )
    origin = real.double().mean(0)
    inside_real = covered(fake, real, squared_radii(real, nearest_k, origin), origin)
    inside_fake = covered(real, fake, squared_radii(fake, nearest_k, origin), origin)
    return PrecisionAndRecall(_share(inside_real), _share(inside_fake))


def _share(inside: Tensor) -> Tensor:
    # Divide on the CPU: a GPU multiplies by 1/n, and 49 of 49 would be less than 1.
    return torch.tensor(int(inside.sum()) / len(inside), dtype=torch.float64, device=inside.device)


class PrecisionRecallMetric(FeatureMetric):
    """Precision and recall of generated images against the reference features."""

    names = ("precision", "recall")

    def __init__(self, nearest_k: int = 3) -> None:
        super().__init__()
        if nearest_k < 1:
            raise UserError(f"nearest_k={nearest_k}: must be at least 1 neighbor")
        self.nearest_k, self.min_images = nearest_k, nearest_k + 1

    def compute(self, features: Tensor) -> dict[str, float]:
        """Return {"precision", "recall"}.

        Raises UserError for no more than nearest_k generated images.
        """
        result = precision_recall(self.real.to(features.device), features, self.nearest_k)
        return {name: float(value) for name, value in result._asdict().items()}

    def describe(self) -> dict[str, Any]:
        """Return the neighbor that sets the radius."""
        return {"nearest_k": self.nearest_k}
