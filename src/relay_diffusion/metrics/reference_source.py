"""Where a reference comes from: images, which are passed through Inception once, or a file of statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
from relay_diffusion.metrics.reference import FeatureStatistics, Reference, read_reference
from relay_diffusion.utils.progress import progress

CHOICE_SEED = 0


class ReferenceSource:
    """A folder or zip of images, an ADM sample or reference .npz, EDM's statistics, or a file of `Reference.save`.

    What must be computed from images is kept in the folder `cache`, by the images and the Inception weights. Statistics
    that a file holds are taken as they are. Pool features are kept of at most `max_features` images (0: none), as
    Kynkäänniemi et al. and ADM compare with 10,000: of more images, a fixed random choice, for names are sorted by
    class. resolution: (H, W) of the generated images; larger reference images are box-averaged if they are a whole
    multiple (but not where the file has statistics, which belong to its images as they are). subset: a folder inside a
    folder or zip. option: what the user calls `path`. Errors: UserError that names it, at once for a path that cannot
    be a reference.
    """

    def __init__(
        self,
        path: str | Path,
        cache: str | Path = "outputs/reference",
        resolution: Sequence[int] | None = None,
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
            size = None if resolution is None else (resolution[0], resolution[1])
            self.images = open_image_set(self.path, option, size, subset)

    def check(self) -> None:
        """Read a file of statistics, so that a damaged one is found before any work. Raises UserError."""
        if self._statistics is not None:
            read_reference(self._statistics)

    def load(
        self, inception: Inception, device: torch.device | str, batch_size: int = 64, show_progress: bool = True
    ) -> Reference:
        """The reference; what is not in the cache is computed on `device` and kept there.

        One process does all the work: on several, call it on one and then on the others, which read the cache.
        Raises UserError for a damaged file, wrong shapes, or spatial statistics in the wrong order.
        """
        stored = read_reference(self._statistics) if self._statistics is not None else None
        if self.images is None:
            assert stored is not None, "a source without images is a file of statistics"
            return self._of_file(stored)
        wanted = _digest(self.images.source_hash, inception.weights_hash, str(self.max_features))
        file = self.cache / f"reference-{wanted[:16]}.npz"
        kept = self._cached(file) if file.exists() else None
        if kept is None or kept.source_hash != wanted or kept.averaging is None:  # older files lack the last
            kept = self._compute(stored, inception, device, batch_size, show_progress)
            kept = replace(kept, source_hash=wanted)
            kept.save(file)
        if stored is not None:
            features = kept.features
            return replace(
                stored, features=features, source_hash=wanted, resolution=kept.resolution, averaging=kept.averaging
            )
        return replace(kept, path=self.path, kind="adm_samples" if self.images.kind == "npz" else self.images.kind)

    def _of_file(self, stored: Reference) -> Reference:
        assert self._statistics is not None
        features = stored.features
        if features is not None:
            features = features[_choice(len(features), self.max_features)] if self.max_features else None
        return replace(
            stored, features=features, source_hash=stored.source_hash or _digest(self._statistics.fingerprint())
        )

    def _cached(self, file: Path) -> Reference:
        try:
            return read_reference(Npz(file, "metrics.reference.cache"))
        except UserError as error:
            raise UserError(f"{error}; delete it to compute it again") from error

    def _compute(
        self,
        stored: Reference | None,
        inception: Inception,
        device: torch.device | str,
        batch_size: int,
        show_progress: bool,
    ) -> Reference:
        assert self.images is not None
        chosen = _choice(len(self.images), self.max_features)
        inception.to(device)
        if stored is not None:  # features alone are missing
            rows = []
            with progress("reference features", len(chosen), enabled=show_progress) as advance:
                for batch in self.images.batches(batch_size, chosen.tolist()):
                    rows.append(inception(batch.to(device)).pool.cpu())
                    advance(len(batch))
            return replace(
                stored,
                features=torch.cat(rows),
                resolution=self.images.resolution,
                averaging=tuple(sorted(self.images.averaging)),
            )
        is_chosen = torch.zeros(len(self.images), dtype=torch.bool).index_fill_(0, chosen, True)
        pool: FrechetDistance | None = None
        kept, done = [], 0
        with progress("reference statistics", len(self.images), enabled=show_progress) as advance:
            for batch in self.images.batches(batch_size):
                features = inception(batch.to(device))
                if pool is None:
                    pool = FrechetDistance(features.pool.shape[1]).to(device)
                    spatial = FrechetDistance(features.spatial[0].numel()).to(device)
                pool.update(features.pool, real=True)
                spatial.update(features.spatial.flatten(1), real=True)
                kept.append(features.pool.cpu()[is_chosen[done : done + len(batch)]])
                done += len(batch)
                advance(len(batch))
        assert pool is not None
        return Reference(
            _on_cpu(pool.statistics(real=True)),
            _on_cpu(spatial.statistics(real=True)),
            torch.cat(kept) if self.max_features else None,
            resolution=self.images.resolution,
            averaging=tuple(sorted(self.images.averaging)),
        )


def _choice(count: int, most: int) -> Tensor:
    """Ascending indices of all `count` images, or of `most` of them drawn without replacement, always the same."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(CHOICE_SEED))
    return order[:most].sort().values


def _on_cpu(statistics: FeatureStatistics) -> FeatureStatistics:
    return FeatureStatistics(statistics.mean.cpu(), statistics.covariance.cpu(), statistics.n)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
