"""Published ways to measure, by name: what must agree for two numbers to be comparable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from relay_diffusion.errors import UserError


@dataclass(frozen=True)
class EvaluationProtocol:
    """How numbers are obtained. None: the protocol does not say.

    rounding: how [-1, 1] becomes 8 bits, see `diffusion.pixels.to_uint8`. spatial_layout: order of the spatial
    features in the protocol's files. split_size: images in a split of the Inception Score. nearest_k: of precision and
    recall, which compare with reference_features images.
    """

    name: str
    rounding: str
    resize: str = "TensorFlow-1 bilinear to 299x299, not antialiased"
    features: str = "Inception-2015-12-05"
    covariance: str = "unbiased"
    spatial_layout: str | None = None
    split_size: int | None = None
    nearest_k: int | None = None
    reference_features: int | None = None

    def describe(self) -> dict[str, Any]:
        """All of it, for the record."""
        return asdict(self)

    def departures(self, rounding: str | None, max_features: int) -> list[str]:
        """In words, what about these images differs from the protocol; rounding None: they were 8-bit before."""
        found = []
        if rounding not in (None, self.rounding):
            found.append(f"images are rounded {rounding}, where {self.name} has {self.rounding}")
        if self.reference_features not in (None, max_features):
            found.append(
                f"at most {max_features:,} reference images, where {self.name} has {self.reference_features:,}"
            )
        return found

    def check(self, settings: Mapping[str, Any], option: str) -> None:
        """Raise UserError if one of a measure's settings contradicts the protocol; `option` names the measure."""
        for key, value in settings.items():
            agreed = getattr(self, key, None)
            if agreed is not None and agreed != value:
                raise UserError(
                    f"{option}.{key}={value}: the protocol {self.name} has {agreed}; leave it at that, or leave out "
                    "metrics.evaluator.protocol"
                )


def edm() -> EvaluationProtocol:
    """As EDM (Karras et al., arXiv 2206.00364) measures: FID alone; 8-bit images are floor(127.5 x + 128)."""
    return EvaluationProtocol("edm", rounding="nearest")


def adm() -> EvaluationProtocol:
    """As ADM (Dhariwal & Nichol, arXiv 2105.05233) measures; 8-bit images are floor(127.5 (x + 1)).

    FID and sFID against stored statistics, the Inception Score in ordered splits of 5,000, precision and recall with
    the third neighbour against 10,000 reference images.
    """
    return EvaluationProtocol(
        "adm", rounding="floor", spatial_layout="NHWC", split_size=5000, nearest_k=3, reference_features=10_000
    )
