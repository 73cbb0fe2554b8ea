"""Reference statistics and features of real images, and their files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from relay_diffusion.data.npz import Npz
from relay_diffusion.errors import UserError
from relay_diffusion.metrics.inception_network import POOL_FEATURES, SPATIAL_CHANNELS, SPATIAL_FEATURES
from relay_diffusion.utils.files import atomic_write

SHAPES = {
    "mu": (POOL_FEATURES,),
    "sigma": (POOL_FEATURES, POOL_FEATURES),
    "mu_s": (SPATIAL_FEATURES,),
    "sigma_s": (SPATIAL_FEATURES, SPATIAL_FEATURES),
}
MAX_INTEGERS = 1000  # longest list of integers in a file
COUNT = "the number of images, at least 2 (0: unknown)"
LAYOUTS = ("NCHW", "NHWC")
CLEARLY = 4.0  # factor; the right order has 5 to 600 times the variance share of the wrong one
MEANINGFUL = 0.15  # share of variance: a wrong order of 7 x 17 x 17 means has at most 0.05


class FeatureStatistics(NamedTuple):
    """Gaussian fit of a feature set, float64.

    mean [D]; covariance [D,D], divided by n - 1; n: number of samples, None if unknown.
    """

    mean: Tensor
    covariance: Tensor
    n: int | None


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics and features of a reference set.

    pool: mean [2048] and covariance [2048,2048] for FID. spatial: mean [2023] and covariance [2023,2023] for sFID, in
    NCHW order, or None. features [K,2048], float32: of all images or a fixed subset of them, for
    precision, recall and KID; None without images. path, kind: the source and its type. layout: the spatial order in
    that file. source_hash: identifies the images or statistics, and the Inception weights. resolution: (H, W) of the
    images after box averaging; averaging: its factors (1: none). Both are None if a file holds statistics alone.
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

    def describe(self) -> dict[str, Any]:
        """Describe the reference for metrics.json."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "images": self.pool.n,
            "features_kept": 0 if self.features is None else len(self.features),
            "spatial_layout": self.layout,
            "source_hash": self.source_hash,
            "resolution": self.resolution,
            "averaging": self.averaging,
        }

    def save(self, path: str | Path) -> None:
        """Write an .npz of this project (atomic write)."""
        arrays: dict[str, Any] = {"mu": self.pool.mean, "sigma": self.pool.covariance}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        arrays = {key: value.cpu().double().numpy() for key, value in arrays.items()}
        if self.features is not None:
            arrays["features"] = self.features.cpu().float().numpy()
        for key in ("resolution", "averaging"):
            if getattr(self, key) is not None:
                arrays[key] = np.array(getattr(self, key), dtype=np.int64)
        arrays |= {"n": np.int64(self.pool.n or 0), "layout": np.str_("NCHW"), "source_hash": np.str_(self.source_hash)}
        with atomic_write(Path(path)) as file:
            np.savez(file, **arrays)


def read_reference(npz: Npz) -> Reference:
    """Read the statistics and features of an .npz file.

    Files of this project have a `layout`. ADM: mu, sigma, mu_s, sigma_s in NHWC order without a `layout`. EDM: mu and
    sigma. Spatial statistics are returned in NCHW order. Raises UserError for a file that lacks a key, holds other
    shapes, or spatial values in another order.
    """
    layout = _optional(npz, "layout", "U", 0, "a text") or "NHWC"
    if layout not in LAYOUTS:
        raise UserError(f"{npz.where}: has the layout {layout!r}; use 'NCHW' or 'NHWC'")
    n = _optional(npz, "n", "iu", 0, COUNT)
    if n is not None and (n < 0 or n == 1):
        raise UserError(f"{npz.where}: 'n' must be {COUNT}, not {n}")
    pool = FeatureStatistics(_numbers(npz, "mu", SHAPES["mu"]), _numbers(npz, "sigma", SHAPES["sigma"]), n or None)
    spatial = None
    if {"mu_s", "sigma_s"} & set(npz.keys):
        mean = _numbers(npz, "mu_s", SHAPES["mu_s"])
        check_layout(mean, layout, npz.where)
        covariance = _numbers(npz, "sigma_s", SHAPES["sigma_s"])
        if layout == "NHWC":
            order = torch.arange(len(mean)).reshape(-1, SPATIAL_CHANNELS).T.flatten()
            mean, covariance = mean[order], covariance[order][:, order]
        spatial = FeatureStatistics(mean, covariance, n or None)
    features = None
    if "features" in npz.keys:
        rows = npz.header("features").shape[:1]
        features = _numbers(npz, "features", (*rows, *SHAPES["mu"])).float()
    resolution, averaging = (_optional(npz, key, "i", 1, "a list of integers") for key in ("resolution", "averaging"))
    return Reference(
        pool,
        spatial,
        features,
        npz.path,
        "statistics" if "layout" in npz.keys else "edm_statistics" if spatial is None else "adm_reference",
        layout if spatial is not None else None,
        _optional(npz, "source_hash", "U", 0, "a text") or "",
        resolution and tuple(resolution),
        averaging and tuple(averaging),
    )


def _numbers(npz: Npz, key: str, shape: tuple[int, ...]) -> Tensor:
    if key not in npz.keys:
        raise UserError(f"{npz.where}: lacks {key!r}; give reference statistics or images")
    header = npz.header(key)
    wrong = f"{npz.where}: {key!r} must hold finite numbers of shape {list(shape)}, not"
    if header.shape != shape or header.dtype.kind != "f":  # check before reading: a wrong array may have any size
        raise UserError(f"{wrong} {header.dtype} of shape {list(header.shape)}")
    array = npz.read(key)
    if not np.isfinite(array).all():
        raise UserError(f"{wrong} nan or infinity")
    return torch.from_numpy(array.astype(np.float32 if header.dtype == np.float32 else np.float64))


def _optional(npz: Npz, key: str, kinds: str, dimensions: int, expected: str) -> Any:
    """Read an optional text, integer or list of integers; None if absent."""
    if key not in npz.keys:
        return None
    shape, _, dtype = npz.header(key)
    if dtype.kind not in kinds or len(shape) != dimensions or not 0 < math.prod(shape) <= MAX_INTEGERS:
        raise UserError(f"{npz.where}: {key!r} must be {expected}, not {dtype} of shape {list(shape)}")
    return npz.read(key).tolist()


def check_layout(mean: Tensor, layout: str, where: str) -> None:
    """Raise UserError if spatial means [D] are clearly not in order `layout`.

    where: name of the file. Channels respond to different features, so their levels differ much more than the positions
    within one channel: in the right order most of the variance lies between channels, in the wrong one every group
    mixes all of them.
    """
    shares = {
        "NCHW": _channel_share(mean.reshape(SPATIAL_CHANNELS, -1)),
        "NHWC": _channel_share(mean.reshape(-1, SPATIAL_CHANNELS).T),
    }
    (other,) = set(LAYOUTS) - {layout}
    if shares[other] > max(MEANINGFUL, CLEARLY * shares[layout]):
        raise UserError(
            f"{where}: its spatial statistics (mu_s, sigma_s) should be in {layout} order, but the values are in "
            f"{other} order; store them in the right order, or the right `layout` in the file"
        )


def _channel_share(channels: Tensor) -> float:
    """Compute the between-channel share of the variance of means [C,positions]."""
    total = channels.var(correction=0)
    return float(channels.mean(1).var(correction=0) / total) if total > 0 else 0.0
