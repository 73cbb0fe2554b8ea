"""Evaluation of generated images against the stored statistics of a reference set."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from relay_diffusion.errors import UserError
from relay_diffusion.files import whole_file
from relay_diffusion.metrics.frechet import FrechetDistance
from relay_diffusion.metrics.inception import Inception
from relay_diffusion.metrics.inception_network import (
    POOL_FEATURES,
    SPATIAL_CHANNELS,
    SPATIAL_FEATURES,
    SPATIAL_SIZE,
)
from relay_diffusion.progress import progress

SHAPES = {
    "mu": (POOL_FEATURES,),
    "sigma": (POOL_FEATURES, POOL_FEATURES),
    "mu_s": (SPATIAL_FEATURES,),
    "sigma_s": (SPATIAL_FEATURES, SPATIAL_FEATURES),
}


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """Mean and unbiased covariance of a reference set's features, float64: what FID and sFID compare with.

    mu [2048] and sigma [2048,2048] of the pooled features; mu_s [2023] and sigma_s [2023,2023] of the spatial ones,
    flattened in the order `layout`; n images. `source_hash` says which images and weights they come from.
    """

    mu: Tensor
    sigma: Tensor
    mu_s: Tensor
    sigma_s: Tensor
    n: int
    layout: str = "NCHW"
    source_hash: str = ""

    def nchw(self) -> ReferenceStatistics:
        """The same statistics with the spatial features in NCHW order; UserError for a layout other than NHWC."""
        if self.layout == "NCHW":
            return self
        if self.layout != "NHWC":
            raise UserError(f"reference statistics have the layout {self.layout!r}; it must be 'NCHW' or 'NHWC'")
        grid = torch.arange(SPATIAL_FEATURES).reshape(SPATIAL_SIZE, SPATIAL_SIZE, SPATIAL_CHANNELS)
        order = grid.permute(2, 0, 1).flatten()
        return replace(self, mu_s=self.mu_s[order], sigma_s=self.sigma_s[order][:, order], layout="NCHW")

    def save(self, path: str | Path) -> None:
        """Write a .npz that appears whole or not at all, also when the machine stops half-way."""
        arrays = {key: getattr(self, key).cpu().double().numpy() for key in SHAPES}
        with whole_file(Path(path)) as file:
            np.savez(
                file,
                **arrays,
                n=np.int64(self.n),
                layout=np.str_(self.layout),
                source_hash=np.str_(self.source_hash),
            )

    @staticmethod
    def load(path: str | Path) -> ReferenceStatistics:
        """Read a file of `save`, in NCHW order whatever the file's layout.

        Raises UserError for a file that is missing or damaged, lacks a key, or holds other shapes or layouts.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no file of reference statistics at {path}")
        try:
            with path.open("rb") as file:
                archive = np.load(file, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise ValueError("a single array")
                found = {key: archive[key] for key in (*SHAPES, "n", "layout", "source_hash") if key in archive}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"{path} is not a readable .npz of reference statistics; delete it to compute it again"
            ) from error
        return _checked(found, path)


def _checked(found: dict[str, np.ndarray], path: Path) -> ReferenceStatistics:
    for key in (*SHAPES, "n", "layout", "source_hash"):
        if key not in found:
            hint = " (statistics of the ADM evaluator are 'NHWC')" if key == "layout" else ""
            raise UserError(f"{path} lacks {key!r}{hint}: it is no file of reference statistics of this project")
    tensors = {}
    for key, shape in SHAPES.items():
        array = found[key]
        if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise UserError(
                f"{path}: {key!r} must hold finite numbers of shape {list(shape)}, "
                f"not {array.dtype} of shape {list(array.shape)}"
            )
        tensors[key] = torch.from_numpy(array.astype(np.float64))
    if found["n"].shape != () or found["n"].dtype.kind not in "iu" or found["n"] < 2:
        raise UserError(f"{path}: 'n' must be the number of images, at least 2")
    layout = str(found["layout"])
    if layout not in ("NCHW", "NHWC"):
        raise UserError(f"{path} has the layout {layout!r}; it must be 'NCHW' or 'NHWC'")
    return ReferenceStatistics(
        **tensors, n=int(found["n"]), layout=layout, source_hash=str(found["source_hash"])
    ).nchw()


def reference_statistics(
    images: Iterable[Tensor],
    total: int,
    inception: Inception,
    source_hash: str,
    path: str | Path,
    device: torch.device | str,
) -> ReferenceStatistics:
    """Statistics of `total` reference images, from the file `path` if it holds just these, else computed and saved.

    `images` yields uint8 batches [B,3,H,W] and is not touched when the file is good; `source_hash` names the images,
    and the stored hash also covers the Inception weights. One process does all the work: call it on one rank and let
    the others load the file. Raises UserError for a damaged file or if `images` does not yield `total` images.
    """
    path = Path(path)
    wanted = hashlib.sha256(f"{source_hash}\n{inception.weights_hash}".encode()).hexdigest()
    if path.exists():
        stored = ReferenceStatistics.load(path)
        if (stored.source_hash, stored.n) == (wanted, total):
            return stored
    inception.to(device)
    pool, spatial = FrechetDistance(POOL_FEATURES).to(device), FrechetDistance(SPATIAL_FEATURES).to(device)
    with progress("reference statistics", total) as advance:
        for batch in images:
            features = inception(batch.to(device))
            pool.update(features.pool, real=True)
            spatial.update(features.spatial.flatten(1), real=True)
            advance(len(batch))
    mu, sigma, count = pool.statistics(real=True)
    mu_s, sigma_s, _ = spatial.statistics(real=True)
    if count != total:
        raise UserError(f"the reference set gave {count} images where {total} were announced")
    result = ReferenceStatistics(mu.cpu(), sigma.cpu(), mu_s.cpu(), sigma_s.cpu(), count, source_hash=wanted)
    result.save(path)
    return result


class Evaluation(nn.Module):
    """FID and sFID of generated uint8 images [B,3,H,W] against a reference, with one Inception pass per image.

    On several ranks each one feeds its own images; `compute` then answers for all of them, on every rank.
    """

    def __init__(self, inception: Inception, reference: ReferenceStatistics) -> None:
        super().__init__()
        reference = reference.nchw()
        self.inception = inception
        self.fid = FrechetDistance(POOL_FEATURES)
        self.fid.set_reference(reference.mu, reference.sigma, reference.n)
        self.sfid = FrechetDistance(SPATIAL_FEATURES)
        self.sfid.set_reference(reference.mu_s, reference.sigma_s, reference.n)
        self.images = _ImageCount()

    def update(self, images: Tensor) -> None:
        """Add a batch of generated images."""
        features = self.inception(images)
        self.fid.update(features.pool, real=False)
        self.sfid.update(features.spatial.flatten(1), real=False)
        self.images.update(len(images))

    def compute(self) -> dict[str, float | int]:
        """{"fid", "sfid", "images"} over all ranks; raises UserError for fewer than 2 images."""
        return {
            "fid": float(self.fid.compute()),
            "sfid": float(self.sfid.compute()),
            "images": int(self.images.compute()),
        }

    def reset(self) -> None:
        """Forget the generated images; the reference stays."""
        for metric in (self.fid, self.sfid, self.images):
            metric.reset()


class _ImageCount(Metric):
    full_state_update = False
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.zeros((), dtype=torch.int64), "sum")

    def update(self, images: int) -> None:
        self.count = self.count + images

    def compute(self) -> Tensor:
        return self.count
