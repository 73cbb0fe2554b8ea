"""Fréchet distance between two sets of features (FID, sFID)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from relay_diffusion.errors import UserError
from relay_diffusion.metrics.base import ExactMetric, ImageMetric
from relay_diffusion.metrics.inception import Inception, InceptionFeatures
from relay_diffusion.metrics.reference import FeatureStatistics, Reference

RECOMMENDED_IMAGES = 10_000  # images; the bias of a Fréchet distance falls with 1/n, and papers use 50,000


class FrechetDistance(ExactMetric):
    """Fréchet distance of Gaussian fits to real and generated features.

    d = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)) (Heusel et al., arXiv 1706.08500), from float64 sums of
    features [N,D] over all ranks. Real features are added with `update(features, real=True)`, or `reference` holds
    their statistics; `reset` keeps these, and they are not summed over ranks.
    """

    is_differentiable = False
    higher_is_better = False

    real_sum: Tensor
    real_outer: Tensor
    real_count: Tensor
    fake_sum: Tensor
    fake_outer: Tensor
    fake_count: Tensor

    def __init__(self, features: int, reference: FeatureStatistics | None = None) -> None:
        super().__init__()
        self.features, self.reference = features, reference
        for side in ("real", "fake"):
            self.add_state(f"{side}_sum", torch.zeros(features, dtype=torch.float64), "sum")
            self.add_state(f"{side}_outer", torch.zeros(features, features, dtype=torch.float64), "sum")
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.int64), "sum")

    def update(self, features: Tensor, real: bool) -> None:
        """Add features [N,D] of any float type.

        Raises ValueError for another shape, and for real features if there is a `reference`.
        """
        if features.ndim != 2 or features.shape[1] != self.features:
            raise ValueError(f"features: must be [N,{self.features}], not {list(features.shape)}")
        if real and self.reference is not None:
            raise ValueError("the real statistics are those of `reference`; update with real=False only")
        side = "real" if real else "fake"
        rows = features.detach().to(self.real_sum.device).double()  # in this order: mps has no float64
        setattr(self, f"{side}_sum", getattr(self, f"{side}_sum") + rows.sum(0))
        setattr(self, f"{side}_outer", torch.addmm(getattr(self, f"{side}_outer"), rows.T, rows))
        setattr(self, f"{side}_count", getattr(self, f"{side}_count") + len(rows))

    def statistics(self, real: bool) -> FeatureStatistics:
        """Return mean, unbiased covariance and count of one side on this rank.

        Raises UserError for fewer than 2 samples.
        """
        if real and self.reference is not None:
            return self.reference
        side = "real" if real else "fake"
        total, outer = getattr(self, f"{side}_sum"), getattr(self, f"{side}_outer")
        count = int(getattr(self, f"{side}_count"))
        if count < 2:
            kind = "real" if real else "generated"
            raise UserError(f"a Fréchet distance needs at least 2 {kind} images, not {count}; give more of them")
        mean = total / count
        return FeatureStatistics(mean, (outer - count * torch.outer(mean, mean)) / (count - 1), count)

    def compute(self) -> Tensor:
        """Return the distance over all ranks, a float64 scalar.

        Raises UserError for fewer than 2 samples on a side.
        """
        real, fake = self.statistics(real=True), self.statistics(real=False)
        mean, covariance = (part.to(fake.mean.device).double() for part in real[:2])
        return frechet_distance(mean, covariance, fake.mean, fake.covariance)


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """Compute the Fréchet distance of two Gaussians.

    Means [D] and covariances [D,D] in float64 -> scalar, finite and >= 0.
    tr((S1 S2)^(1/2)) is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric: they are
    real even if S1 or S2 is singular. With S1 = V diag(w) V^T they are those of R^T S2 R, R = V diag(w)^(1/2).
    """
    values, vectors = torch.linalg.eigh(covariance1)
    root = vectors * values.clamp(min=0).sqrt()
    product = root.T @ covariance2 @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    trace = covariance1.trace() + covariance2.trace() - 2 * eigenvalues.clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + trace).clamp(min=0)


class FrechetMetric(ImageMetric):
    """Fréchet distance of one kind of Inception features to the reference.

    label: its name in warnings. layer: the field of `InceptionFeatures` and `Reference`.
    """

    label: ClassVar[str]
    layer: ClassVar[Literal["pool", "spatial"]]

    def prepare(self, reference: Reference, inception: Inception) -> str | None:  # noqa: ARG002
        """Take the reference's statistics."""
        statistics: FeatureStatistics | None = getattr(reference, self.layer)
        if statistics is None:
            return f"the reference {reference.path} holds no {self.layer} statistics"
        self.distance = FrechetDistance(len(statistics.mean), statistics)
        return None

    def update(self, features: InceptionFeatures, positions: Tensor) -> None:  # noqa: ARG002
        """Add generated images."""
        self.distance.update(getattr(features, self.layer).flatten(1), real=False)

    def compute(self, features: Tensor) -> dict[str, float]:  # noqa: ARG002
        """Return the distance by name. Raises UserError for fewer than 2 images."""
        return {self.names[0]: float(self.distance.compute())}

    def warnings(self, images: int) -> list[str]:
        """Return a line if a covariance is singular: that of n images has at most rank n - 1."""
        width, reference = self.distance.features, self.distance.statistics(real=True).n
        sides = (("generated", images), ("reference", reference))
        few = [f"{count:,} {side}" for side, count in sides if count is not None and count <= width]
        if not few:
            return []
        return [
            f"{self.label} is unreliable with {' and '.join(few)} images: {width:,} features need at least "
            f"{width + 1:,}; use {RECOMMENDED_IMAGES:,} or more (papers use 50,000), and compare distances only "
            "between equal numbers of images"
        ]


class FIDMetric(FrechetMetric):
    """Fréchet Inception Distance of pool features (Heusel et al., arXiv 1706.08500)."""

    names = ("fid",)
    label = "FID"
    layer = "pool"


class SFIDMetric(FrechetMetric):
    """Fréchet distance of spatial features, sFID (Nash et al., arXiv 2103.03841).

    The features are the first 7 channels of a 17x17 layer, in NCHW order.
    """

    names = ("sfid",)
    label = "sFID"
    layer = "spatial"
