"""In place of Inception: features that cost nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from relay_diffusion.metrics import InceptionFeatures, Reference
from relay_diffusion.metrics import reference as reference_module
from relay_diffusion.metrics.reference import FeatureStatistics
from relay_diffusion.utils.pictures import to_rgb

POOL, CHANNELS, SIZE, CLASSES = 6, 7, 2, 5
SPATIAL = CHANNELS * SIZE**2


class PixelFeatures(nn.Module):
    """Pixels of RGB images as features, the classes too unless there are none; counts its passes."""

    device = torch.device("cpu")

    def __init__(self, weights_hash: str = "pixels", has_classes: bool = True) -> None:
        super().__init__()
        self.weights_hash, self.has_classes, self.seen = weights_hash, has_classes, 0

    def forward(self, images: Tensor) -> InceptionFeatures:
        self.seen += len(images)
        x = to_rgb(images).flatten(1).float() / 255
        spatial = x[:, POOL : POOL + SPATIAL].unflatten(1, (CHANNELS, SIZE, SIZE))
        return InceptionFeatures(x[:, :POOL], spatial, 4 * x[:, -CLASSES:] if self.has_classes else None)


def random_images(count: int, seed: int, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def statistics(rows: Tensor) -> FeatureStatistics:
    rows = rows.flatten(1).double()
    return FeatureStatistics(rows.mean(0), torch.cov(rows.T), len(rows))


def pixel_reference(images: Tensor) -> Reference:
    """Statistics and features by their formulas."""
    features = PixelFeatures()(images)
    return Reference(statistics(features.pool), statistics(features.spatial), features.pool)


def write_edm(reference: Reference, path: Path) -> None:
    """Write mu and sigma, as EDM's fid.py does."""
    np.savez(path, mu=reference.pool.mean.numpy(), sigma=reference.pool.covariance.numpy())


def write_adm(reference: Reference, path: Path) -> None:
    """Write pool and spatial statistics, the latter in NHWC order, as ADM's evaluator does."""
    assert reference.spatial is not None
    mean, covariance, _ = reference.spatial
    order = torch.arange(len(mean)).reshape(CHANNELS, -1).T.flatten()
    write_edm(reference, path)
    np.savez(path, mu_s=mean[order].numpy(), sigma_s=covariance[order][:, order].numpy(), **dict(np.load(path)))


def use_small_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files hold as few features as `PixelFeatures` gives."""
    shapes = {"mu": (POOL,), "sigma": (POOL, POOL), "mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}
    monkeypatch.setattr(reference_module, "SHAPES", shapes)
    monkeypatch.setattr(reference_module, "SPATIAL_CHANNELS", CHANNELS)
