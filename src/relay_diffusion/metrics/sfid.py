"""sFID: the Fréchet distance of spatial Inception features."""

from __future__ import annotations

from torch import Tensor

from relay_diffusion.metrics.frechet import FrechetDistance
from relay_diffusion.metrics.inception import Inception, InceptionFeatures
from relay_diffusion.metrics.measure import Measure
from relay_diffusion.metrics.reference import Reference


class SFIDMeasure(Measure):
    """Fréchet distance of the first 7 channels of a 17x17 layer (Nash et al., arXiv 2103.03841)."""

    names = ("sfid",)

    def prepare(self, reference: Reference, inception: Inception) -> str | None:  # noqa: ARG002
        """The reference must hold spatial statistics."""
        if reference.spatial is None:
            return f"the reference {reference.path} holds no spatial statistics"
        self.distance = FrechetDistance(len(reference.spatial.mean))
        self.distance.set_reference(*reference.spatial)
        return None

    def update(self, features: InceptionFeatures, positions: Tensor) -> None:  # noqa: ARG002
        """Add generated images."""
        self.distance.update(features.spatial.flatten(1), real=False)

    def compute(self, features: Tensor) -> dict[str, float]:  # noqa: ARG002
        """{"sfid"}; UserError for fewer than 2 images."""
        return {"sfid": float(self.distance.compute())}

    def warnings(self, images: int) -> list[str]:
        """Too few images for a covariance of full rank."""
        return self.distance.singular("sFID", images)
