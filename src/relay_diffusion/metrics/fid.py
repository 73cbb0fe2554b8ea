"""FID: the Fréchet distance of pooled Inception features."""

from __future__ import annotations

from torch import Tensor

from relay_diffusion.metrics.frechet import FrechetDistance
from relay_diffusion.metrics.inception import Inception, InceptionFeatures
from relay_diffusion.metrics.measure import Measure
from relay_diffusion.metrics.reference import Reference


class FIDMeasure(Measure):
    """Fréchet Inception Distance (Heusel et al., arXiv 1706.08500)."""

    names = ("fid",)

    def prepare(self, reference: Reference, inception: Inception) -> str | None:  # noqa: ARG002
        """Any reference has what it needs."""
        self.distance = FrechetDistance(len(reference.pool.mean))
        self.distance.set_reference(*reference.pool)
        return None

    def update(self, features: InceptionFeatures, positions: Tensor) -> None:  # noqa: ARG002
        """Add generated images."""
        self.distance.update(features.pool, real=False)

    def compute(self, features: Tensor) -> dict[str, float]:  # noqa: ARG002
        """{"fid"}; UserError for fewer than 2 images."""
        return {"fid": float(self.distance.compute())}

    def warnings(self, images: int) -> list[str]:
        """Too few images for a covariance of full rank."""
        return self.distance.singular("FID", images)
