"""Load a reference from images or from a file of statistics."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from relay_diffusion.data.image_sets import IMAGES_KEY, ArraySet, ImageSet, open_image_set
from relay_diffusion.data.npz import Npz
from relay_diffusion.data.sources import existing_path
from relay_diffusion.errors import UserError
from relay_diffusion.metrics.frechet import FrechetDistance
from relay_diffusion.metrics.inception import Inception
from relay_diffusion.metrics.reference import Reference, read_reference
from relay_diffusion.utils.progress import progress
from relay_diffusion.utils.resolution import Resolution, image_size

CHOICE_SEED = 0


class ReferenceSource:
    """Source of a reference: images or a file of statistics.

    path: a folder or zip of images, a sample or reference .npz of ADM, statistics of EDM, or a file of
    `Reference.save`. cache: folder for results computed from images, by hash of the images and the Inception weights.
    Statistics in a file are used unchanged. max_features: number of images whose pool features are kept (0: none); of
    more images, a fixed random subset, because names are sorted by class. Kynkäänniemi et al. and ADM compare with
    10,000. resolution: of the generated images, R or [height, width]; larger reference images are box-averaged if they
    are a whole multiple, unless the file has statistics of the original images. subset: a folder inside a folder or
    zip. option: key of `path`, for messages. Raises UserError naming the option for a path that cannot be a reference.
    """

    def __init__(
        self,
        path: str | Path,
        cache: str | Path = "outputs/reference",
        resolution: Resolution | None = None,
        subset: str = "",
        max_features: int = 10_000,
        option: str = "reference",
    ) -> None:
        if max_features < 0:
            raise UserError(f"metrics.reference.max_features={max_features}: must be 0 or more")
        self.cache, self.max_features = Path(cache), max_features
        self.path = existing_path(path, option)
        self.images: ImageSet | None = None
        self._statistics: Npz | None = None
        if self.path.suffix == ".npz" and self.path.is_file():
            npz = Npz(self.path, option)
            if not {"mu", "sigma", "mu_s", "sigma_s", IMAGES_KEY} & set(npz.keys):
                raise UserError(
                    f"{npz.where}: holds {', '.join(npz.keys) or 'nothing'}; a reference has mu and sigma, or images "
                    f"as {IMAGES_KEY!r}"
                )
            if {"mu", "sigma", "mu_s", "sigma_s"} & set(npz.keys):
                self._statistics = npz
                if IMAGES_KEY in npz.keys and max_features:
                    self.images = ArraySet(npz, resolution=None)
        if self._statistics is None:
            size = None if resolution is None else image_size(resolution)
            self.images = open_image_set(self.path, option, size, subset)

    def check(self) -> None:
        """Read a file of statistics before images are sampled. Raises UserError if it is damaged."""
        if self._statistics is not None:
            read_reference(self._statistics)

    def load(
        self, inception: Inception, device: torch.device | str, batch_size: int = 64, show_progress: bool = True
    ) -> Reference:
        """Load the reference, from the cache if possible.

        Otherwise compute it on `device` and cache it. With several ranks, call it on one rank first; the others then
        read the cache. Raises UserError for a damaged file, wrong shapes, or spatial statistics in the wrong order.
        """
        stored = read_reference(self._statistics) if self._statistics is not None else None
        if self.images is None:
            assert stored is not None, "a source without images is a file of statistics"
            features = None
            if stored.features is not None and self.max_features:
                features = stored.features[_choice(len(stored.features), self.max_features)]
            source_hash = stored.source_hash or _digest(self._statistics.fingerprint())  # type: ignore[union-attr]
            return replace(stored, features=features, source_hash=source_hash)
        wanted = _digest(self.images.source_hash, inception.weights_hash, str(self.max_features))
        file = self.cache / f"reference-{wanted[:16]}.npz"
        kept = self._cached(file) if file.exists() else None
        if kept is None or kept.source_hash != wanted or kept.averaging is None:  # older files have no averaging
            kept = self._compute(self.images, stored, inception, device, batch_size, show_progress)
            kept = replace(kept, source_hash=wanted)
            kept.save(file)
        if stored is None:
            kind = "adm_samples" if self.images.kind == "npz" else self.images.kind
            return replace(kept, path=self.path, kind=kind)
        return replace(
            stored, features=kept.features, source_hash=wanted, resolution=kept.resolution, averaging=kept.averaging
        )

    def _cached(self, file: Path) -> Reference:
        try:
            return read_reference(Npz(file, "metrics.reference.cache"))
        except UserError as error:
            raise UserError(f"{error}; delete it to compute it again") from error

    def _compute(
        self,
        images: ImageSet,
        stored: Reference | None,
        inception: Inception,
        device: torch.device | str,
        batch_size: int,
        show_progress: bool,
    ) -> Reference:
        """Compute features of the chosen images, and statistics of all unless `stored`."""
        chosen = _choice(len(images), self.max_features).tolist()
        indices = list(range(len(images))) if stored is None else chosen
        is_chosen = torch.isin(torch.tensor(indices), torch.tensor(chosen))
        inception.to(device)
        distances: list[FrechetDistance] = []
        kept, done = [], 0
        what = "statistics" if stored is None else "features"
        with progress(f"reference {what}", len(indices), enabled=show_progress) as advance:
            for batch in images.batches(batch_size, indices):
                features = inception(batch.to(device))
                if stored is None:
                    both = features.pool, features.spatial.flatten(1)
                    distances = distances or [FrechetDistance(rows.shape[1]).to(device) for rows in both]
                    for distance, rows in zip(distances, both, strict=True):
                        distance.update(rows, real=True)
                kept.append(features.pool.cpu()[is_chosen[done : done + len(batch)]])
                done += len(batch)
                advance(len(batch))
        if stored is None:
            pool, spatial = (distance.cpu().statistics(real=True) for distance in distances)
            stored = Reference(pool, spatial)
        return replace(
            stored,
            features=torch.cat(kept) if self.max_features else None,
            resolution=images.resolution,
            averaging=tuple(sorted(images.averaging)),
        )


def _choice(count: int, most: int) -> Tensor:
    """Draw at most `most` of `count` indices, ascending.

    The draw is fixed, without replacement.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(CHOICE_SEED))
    return order[:most].sort().values


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
