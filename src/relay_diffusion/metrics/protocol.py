"""Published evaluation protocols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from relay_diffusion.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """Settings of a published evaluation.

    None: the protocol does not define the setting. rounding: how [-1, 1] is rounded to 8 bits, see
    `diffusion.pixels.to_uint8`. spatial_layout: order of the spatial features in the protocol's files. split_size:
    images per split of the Inception Score. nearest_k: neighbor whose distance is the radius of precision and recall.
    reference_features: number of their reference images.
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
        """Return all settings."""
        return asdict(self)

    def departures(self, rounding: str | None, max_features: int) -> list[str]:
        """Describe differences of these images from the protocol.

        rounding: None if unknown.
        """
        found = []
        if rounding not in (None, self.rounding):
            found.append(f"images are rounded {rounding}, where {self.name} has {self.rounding}")
        if self.reference_features not in (None, max_features):
            found.append(
                f"at most {max_features:,} reference images, where {self.name} has {self.reference_features:,}"
            )
        return found

    def check(self, settings: Mapping[str, Any], option: str) -> None:
        """Raise UserError if the settings of a metric contradict the protocol.

        option: the key of the metric.
        """
        for key, value in settings.items():
            agreed = getattr(self, key, None)
            if agreed is not None and agreed != value:
                raise UserError(
                    f"{option}.{key}={value}: the protocol {self.name} uses {agreed}; use this value, or remove "
                    "metrics.evaluator.protocol"
                )


def edm() -> Protocol:
    """Protocol of EDM (Karras et al., arXiv 2206.00364).

    FID alone; 8-bit images are floor(127.5 x + 128).
    """
    return Protocol("edm", rounding="nearest")


def adm() -> Protocol:
    """Protocol of ADM (Dhariwal & Nichol, arXiv 2105.05233).

    8-bit images are floor(127.5 (x + 1)). FID and sFID against the statistics in a file, the Inception Score in ordered
    splits of 5,000, precision and recall with the third neighbor against 10,000 reference images.
    """
    return Protocol(
        "adm", rounding="floor", spatial_layout="NHWC", split_size=5000, nearest_k=3, reference_features=10_000
    )
