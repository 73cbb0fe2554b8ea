"""Kernel Inception Distance of pooled features (Bińkowski et al., arXiv 1801.01401)."""

from __future__ import annotations

import torch
from torch import Tensor

from relay_diffusion.errors import UserError
from relay_diffusion.metrics.base import FeatureMetric

BLOCK_ELEMENTS = 2**24  # elements of the kernel matrix at once: 128 MiB


def kernel_distance(real: Tensor, fake: Tensor) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy (MMD).

    Features [M,D] and [N,D] -> float64 scalar. With k(x, y) = (x.y / D + 1)^3: mean of k over pairs of different real
    images, plus that over pairs of different generated ones, minus twice the mean over all mixed pairs. All images are
    used instead of random subsets, so the result is deterministic. An unbiased estimate of a small number may be
    negative: that of a set with itself is -2/N (mean k(x, x) - mean k(x, y)). Raises UserError for fewer than 2 images
    on a side.
    """
    for name, features in (("real", real), ("generated", fake)):
        if len(features) < 2:
            raise UserError(f"KID needs at least 2 {name} images, not {len(features)}; give more of them")
    return _mean_of_pairs(real) + _mean_of_pairs(fake) - 2 * _sum(real, fake) / (len(real) * len(fake))


def _mean_of_pairs(x: Tensor) -> Tensor:
    own = (x.double().square().mean(1) + 1).pow(3).sum()  # k(x, x), which the unbiased estimate excludes
    return (_sum(x, x) - own) / (len(x) * (len(x) - 1))


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """Sum the kernel over all pairs."""
    columns = b.double().T / b.shape[1]
    rows = a.double().split(max(1, BLOCK_ELEMENTS // len(b)))
    return torch.stack([(block @ columns + 1).pow(3).sum() for block in rows]).sum()


class KIDMetric(FeatureMetric):
    """Kernel Inception Distance of generated images to the reference features.

    Not multiplied by 1000, as in many papers; deterministic, see `kernel_distance`.
    """

    names = ("kid",)
    min_images = 2

    def compute(self, features: Tensor) -> dict[str, float]:
        """Return {"kid"}. Raises UserError for fewer than 2 generated images."""
        return {"kid": float(kernel_distance(self.real.to(features.device), features))}
