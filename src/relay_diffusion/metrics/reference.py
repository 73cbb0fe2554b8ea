"""What generated images are compared with: statistics and features of real ones, and the files that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from relay_diffusion.data.npz import Npz
from relay_diffusion.errors import UserError
from relay_diffusion.metrics.inception_network import POOL_FEATURES, SPATIAL_CHANNELS, SPATIAL_FEATURES, SPATIAL_SIZE
from relay_diffusion.utils.files import atomic_write

SHAPES = {
    "mu": (POOL_FEATURES,),
    "sigma": (POOL_FEATURES, POOL_FEATURES),
    "mu_s": (SPATIAL_FEATURES,),
    "sigma_s": (SPATIAL_FEATURES, SPATIAL_FEATURES),
}
MAX_WHOLE_NUMBERS = 1000  # in a list of a file


class FeatureStatistics(NamedTuple):
    """Gaussian fit of a feature set, float64: mean [D], covariance [D,D] (divided by n - 1), n samples if known."""

    mean: Tensor
    covariance: Tensor
    n: int | None


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics and features of a reference set.

    pool: mean [2048] and covariance [2048,2048] for FID. spatial: mean [2023] and covariance [2023,2023] for sFID, in
    NCHW order; None where a file has none. features [K,2048], float32: of all images or a fixed choice of them, for
    precision, recall and KID; None where there are no images. path, kind: where it comes from, and what that is.
    layout: the spatial order of that file. source_hash: which images or numbers, and which Inception weights.
    resolution: (H, W) of the images as they were compared; averaging: the factors by which they were box-averaged to
    it (1: as stored). Both are None where a file holds statistics alone.
    """

    pool: FeatureStatistics
    spatial: FeatureStatistics | None
    features: Tensor | None = None
    path: Path = Path()
    kind: str = "statistics"
    layout: str | None = "NCHW"
    source_hash: str = ""
    resolution: tuple[int, ...] | None = None
    averaging: tuple[int, ...] | None = None

    @property
    def images(self) -> int | None:
        """How many images the statistics come from, if that is known."""
        return self.pool.n

    def describe(self) -> dict[str, Any]:
        """What the numbers were compared with."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "images": self.images,
            "features_kept": 0 if self.features is None else len(self.features),
            "spatial_layout": self.layout,
            "source_hash": self.source_hash,
            "resolution": self.resolution,
            "averaging": self.averaging,
        }

    def save(self, path: str | Path) -> None:
        """Write all of it as an .npz of this project, whole or not at all."""
        arrays = _arrays(self.pool, "mu", "sigma")
        if self.spatial is not None:
            arrays |= _arrays(self.spatial, "mu_s", "sigma_s")
        if self.features is not None:
            arrays["features"] = self.features.cpu().float().numpy()
        arrays["n"] = np.int64(self.pool.n or 0)
        for key in ("resolution", "averaging"):
            if getattr(self, key) is not None:
                arrays[key] = np.array(getattr(self, key), dtype=np.int64)
        _write(path, arrays | {"layout": np.str_("NCHW"), "source_hash": np.str_(self.source_hash)})


def _arrays(statistics: FeatureStatistics, mean: str, covariance: str) -> dict[str, Any]:
    return {
        mean: statistics.mean.cpu().double().numpy(),
        covariance: statistics.covariance.cpu().double().numpy(),
    }


def _write(path: str | Path, arrays: dict[str, Any]) -> None:
    with atomic_write(Path(path)) as file:
        np.savez(file, **arrays)


def read_reference(npz: Npz) -> Reference:
    """Statistics (and features) of an .npz of this project, of ADM or of EDM, spatial ones in NCHW order.

    Of this project: it says its `layout`. ADM: mu, sigma, mu_s, sigma_s, NHWC without saying so. EDM: mu and sigma.
    Raises UserError for a file that lacks a key, holds other shapes, or spatial values in another order.
    """
    layout = _text(npz, "layout", "NHWC")
    if layout not in LAYOUTS:
        raise UserError(f"{npz.where}: has the layout {layout!r}; it must be 'NCHW' or 'NHWC'")
    n = _count(npz)
    pool = FeatureStatistics(_numbers(npz, "mu", SHAPES["mu"]), _numbers(npz, "sigma", SHAPES["sigma"]), n)
    spatial = None
    if "mu_s" in npz.keys or "sigma_s" in npz.keys:
        mean = _numbers(npz, "mu_s", SHAPES["mu_s"])
        check_layout(mean, layout, npz.where)
        spatial = to_nchw(FeatureStatistics(mean, _numbers(npz, "sigma_s", SHAPES["sigma_s"]), n), layout)
    features = None
    if "features" in npz.keys:
        rows = npz.header("features").shape[:1]
        features = _numbers(npz, "features", (*rows, *SHAPES["mu"])).float()
    kind = "statistics" if "layout" in npz.keys else "edm_statistics" if spatial is None else "adm_reference"
    return Reference(
        pool,
        spatial,
        features,
        npz.path,
        kind,
        layout if spatial is not None else None,
        _text(npz, "source_hash", ""),
        _whole_numbers(npz, "resolution"),
        _whole_numbers(npz, "averaging"),
    )


def _numbers(npz: Npz, key: str, shape: tuple[int, ...]) -> Tensor:
    if key not in npz.keys:
        raise UserError(f"{npz.where}: lacks {key!r}; it is no file of reference statistics")
    header = npz.header(key)
    wrong = f"{npz.where}: {key!r} must hold finite numbers of shape {list(shape)}, not"
    if header.shape != shape or header.dtype.kind != "f":  # before it is read: a wrong one may be of any size
        raise UserError(f"{wrong} {header.dtype} of shape {list(header.shape)}")
    array = npz.read(key)
    if not np.isfinite(array).all():
        raise UserError(f"{wrong} nan or infinity")
    return torch.from_numpy(array.astype(np.float32 if header.dtype == np.float32 else np.float64))


def _text(npz: Npz, key: str, default: str) -> str:
    if key not in npz.keys:
        return default
    header = npz.header(key)
    if header.shape != () or header.dtype.kind != "U":
        raise UserError(f"{npz.where}: {key!r} must be a text, not {header.dtype} of shape {list(header.shape)}")
    return str(npz.read(key))


def _whole_numbers(npz: Npz, key: str) -> tuple[int, ...] | None:
    if key not in npz.keys:
        return None
    header = npz.header(key)
    if len(header.shape) != 1 or not 0 < header.shape[0] <= MAX_WHOLE_NUMBERS or header.dtype.kind != "i":
        raise UserError(f"{npz.where}: {key!r} must be a list of integers, not {header.dtype} {list(header.shape)}")
    return tuple(npz.read(key).tolist())


def _count(npz: Npz) -> int | None:
    if "n" not in npz.keys:
        return None
    header = npz.header("n")
    count = int(npz.read("n")) if header.shape == () and header.dtype.kind in "iu" else -1
    if count < 0 or count == 1:
        raise UserError(f"{npz.where}: 'n' must be the number of images, at least 2 (0: unknown)")
    return count or None


LAYOUTS = ("NCHW", "NHWC")
CLEARLY = 4.0  # times the share of variance; the right order has 5 to 600 times that of the wrong one
MEANINGFUL = 0.15  # share of variance: a wrong order of 7 x 17 x 17 means has at most 0.05


def to_nchw(statistics: FeatureStatistics, layout: str) -> FeatureStatistics:
    """Statistics in the order `layout`, to NCHW order."""
    if layout == "NCHW":
        return statistics
    return _reorder(statistics, _places().reshape(SPATIAL_SIZE, SPATIAL_SIZE, SPATIAL_CHANNELS).permute(2, 0, 1))


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
