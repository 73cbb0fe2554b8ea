"""The order of the spatial features: channels first (NCHW, as here) or last (NHWC, as in ADM's files)."""

from __future__ import annotations

import torch
from torch import Tensor

from relay_diffusion.errors import UserError
from relay_diffusion.metrics.frechet import FeatureStatistics
from relay_diffusion.metrics.inception_network import SPATIAL_CHANNELS, SPATIAL_SIZE

LAYOUTS = ("NCHW", "NHWC")
CLEARLY = 4.0  # times the share of variance; the right order has 5 to 600 times that of the wrong one
MEANINGFUL = 0.15  # share of variance: a wrong order of 7 x 17 x 17 means has at most 0.05


def to_nchw(statistics: FeatureStatistics, layout: str) -> FeatureStatistics:
    """Statistics in the order `layout`, to NCHW order."""
    if layout == "NCHW":
        return statistics
    return _reorder(statistics, _places().reshape(SPATIAL_SIZE, SPATIAL_SIZE, SPATIAL_CHANNELS).permute(2, 0, 1))


def to_nhwc(statistics: FeatureStatistics) -> FeatureStatistics:
    """Statistics in NCHW order, to NHWC order."""
    return _reorder(statistics, _places().reshape(SPATIAL_CHANNELS, SPATIAL_SIZE, SPATIAL_SIZE).permute(1, 2, 0))


def _places() -> Tensor:
    return torch.arange(SPATIAL_CHANNELS * SPATIAL_SIZE**2)


def _reorder(statistics: FeatureStatistics, order: Tensor) -> FeatureStatistics:
    order = order.flatten()
    mean, covariance, n = statistics
    return FeatureStatistics(mean[order], covariance[order][:, order], n)


def channel_share(mean: Tensor, layout: str) -> float:
    """Share of the variance of spatial means [D] that lies between channels, if `layout` is their order."""
    if layout == "NCHW":
        channels = mean.reshape(SPATIAL_CHANNELS, SPATIAL_SIZE**2)
    else:
        channels = mean.reshape(SPATIAL_SIZE**2, SPATIAL_CHANNELS).T
    total = mean.var(correction=0)
    return float(channels.mean(1).var(correction=0) / total) if total > 0 else 0.0


def check_layout(mean: Tensor, layout: str, where: str) -> None:
    """Raise UserError if spatial means [D] are clearly not in the order `layout`; `where` names the file.

    Channels respond to other things and differ in their level much more than the places of one image do: in the right
    order most of the variance lies between channels, in the wrong one every group mixes all of them.
    """
    (other,) = set(LAYOUTS) - {layout}
    claimed, contrary = channel_share(mean, layout), channel_share(mean, other)
    if contrary > MEANINGFUL and contrary > CLEARLY * claimed:
        raise UserError(
            f"{where}: its spatial statistics (mu_s, sigma_s) should be in {layout} order, but the values are in "
            f"{other} order; store them in the right order, or the right `layout` in the file"
        )
