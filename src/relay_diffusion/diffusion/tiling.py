"""Overlapping tiles as a wrapper of a denoiser, independent of the sampler."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from relay_diffusion.diffusion.guidance import Denoiser
from relay_diffusion.utils.resolution import Size, resolution_of

COARSEST = 4  # least number of steps along each axis of a tile: pixels of the network's coarsest level
MARGIN = 1 / 8  # share of the overlap next to a tile's edge without weight: zero padding is visible there


@dataclass(frozen=True)
class Tiling:
    """Tiles of one size that cover an image.

    size: height and width of a tile; an image is not cut along an axis on which it is smaller. overlap: of neighboring
    tiles, at least, in pixels. step: positions are its multiples, as the levels of the network and the blocks need.
    batch: tiles evaluated at once. Raises ValueError for tiles and overlaps that `step` does not divide, for tiles of
    less than COARSEST steps, and for an overlap that is not below the tile.
    """

    size: Size
    overlap: int
    step: int = 1
    batch: int = 1

    def __post_init__(self) -> None:
        small, step = min(self.size), self.step
        given = f"tile={resolution_of(self.size)}"
        if small < COARSEST * step:
            raise ValueError(f"{given}: is smaller than the network needs; use at least {COARSEST * step}")
        if any(side % step for side in self.size):
            raise ValueError(f"{given}: must be divisible by {step}; use {_nearest(small, step)}")
        if not 0 < self.overlap < small:
            raise ValueError(
                f"overlap={self.overlap}: must be above 0 and below the tile, {small}; use {_nearest(small / 4, step)}"
            )
        if self.overlap % step:
            raise ValueError(f"overlap={self.overlap}: must be divisible by {step}; use {_nearest(self.overlap, step)}")
        if self.batch < 1:
            raise ValueError(f"tile_batch={self.batch}: must be at least 1")

    def tile(self, size: Size) -> Size:
        """Return the size of the tiles of an image."""
        return min(self.size[0], size[0]), min(self.size[1], size[1])

    def count(self, size: Size) -> int:
        """Count the tiles of an image."""
        return math.prod(len(self.positions(*sides)) for sides in zip(size, self.tile(size), strict=True))

    def positions(self, side: int, tile: int) -> list[int]:
        """Return the positions of tiles along an axis.

        First pixels, evenly spaced over an axis of `side` pixels. Raises ValueError for a side that `step` does not
        divide.
        """
        if side % self.step:
            raise ValueError(f"a side of {side} pixels: must be divisible by {self.step}")
        last = -(-(side - tile) // (tile - self.overlap)) if side > tile else 0
        return [k * (side - tile) // max(last, 1) // self.step * self.step for k in range(last + 1)]

    def weights(self, side: int, tile: int) -> Tensor:
        """Return the weights of tiles along an axis: [tiles, tile], of sum 1 at each pixel.

        A squared sine rises over the overlap, except for MARGIN at both of its ends. There is none at the image's
        edges.
        """
        positions = self.positions(side, tile)
        margin = self.overlap * MARGIN
        distance = torch.arange(tile, dtype=torch.float64, device="cpu") + 0.5
        rise = torch.sin(((distance - margin) / (self.overlap - 2 * margin)).clamp(0, 1) * (math.pi / 2)) ** 2
        weights = torch.ones(len(positions), tile, dtype=torch.float64, device="cpu")
        weights[1:] *= rise
        weights[:-1] *= rise.flip(0)
        total = torch.zeros(side, dtype=torch.float64, device="cpu")
        for position, weight in zip(positions, weights, strict=True):
            total[position : position + tile] += weight
        return torch.stack([w / total[at : at + tile] for at, w in zip(positions, weights, strict=True)]).float()


class TiledDenoiser:
    """Denoiser that evaluates tiles of an image and blends the estimates.

    Sampler and noise are those of the whole image, so that neighboring tiles agree (MultiDiffusion, Bar-Tal et al.
    2023, arXiv 2302.08113, with smooth weights). The network's memory depends on the tile, not on the image.
    """

    def __init__(self, denoise: Denoiser, tiling: Tiling) -> None:
        self.denoise, self.tiling = denoise, tiling

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Return the blended estimate [B,C,H,W].

        x [B,C,H,W], sigma [B], labels [B] or None. Raises ValueError unless the tiling's step divides H and W.
        """
        size = x.shape[2], x.shape[3]
        height, width = self.tiling.tile(size)
        if (height, width) == size:
            return self.denoise(x, sigma, labels)
        rows, columns = (
            list(zip(self.tiling.positions(*sides), self.tiling.weights(*sides).to(x.device), strict=True))
            for sides in zip(size, (height, width), strict=True)
        )
        blended: Tensor | None = None
        grid, together = list(itertools.product(rows, columns)), max(1, self.tiling.batch // len(x))
        for places in (grid[first : first + together] for first in range(0, len(grid), together)):
            crops = [x[:, :, top : top + height, left : left + width] for (top, _), (left, _) in places]
            times = len(places)
            estimates = self.denoise(
                torch.cat(crops), sigma.repeat(times), None if labels is None else labels.repeat(times)
            )
            if blended is None:
                blended = torch.zeros_like(x, dtype=estimates.dtype, memory_format=torch.contiguous_format)
            for ((top, across), (left, along)), estimate in zip(places, estimates.chunk(times), strict=True):
                weight = across[:, None] * along
                blended[:, :, top : top + height, left : left + width].addcmul_(estimate, weight)
        assert blended is not None
        return blended


def mirrored(images: Tensor, size: Size) -> Tensor:
    """Pad images by mirroring at their lower and right edges.

    [B,C,h,w] -> [B,C,*size]; size: at least (h, w).
    """
    if tuple(images.shape[2:]) == size:
        return images
    rows, columns = (_mirrored_indices(*sides, images.device) for sides in zip(images.shape[2:], size, strict=True))
    return images[:, :, rows[:, None], columns]


def _mirrored_indices(side: int, wanted: int, device: torch.device) -> Tensor:
    index = torch.arange(wanted, device=device) % (2 * side)
    return torch.minimum(index, 2 * side - 1 - index)


def _nearest(value: float, step: int) -> int:
    return max(1, round(value / step)) * step
