"""White and block noise, and one random stream per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RandnLike = Callable[[Tensor], Tensor]
"""Draws standard normal noise of the shape, dtype and device of its argument."""


def block_noise(white: Tensor, block: int) -> Tensor:
    """Noise that is alike within `block` pixels: the sum of block x block circular shifts of white noise, over block.

    [B,C,H,W] -> [B,C,H,W]. Unit variance; pixels at distance (dx, dy) correlate by
    max(0, s-|dx|)/s * max(0, s-|dy|)/s. A circular box filter computes it (Teng et al., section 3.2).
    """
    before = block - 1  # shifts by 0..block-1: every pixel sees itself and what lies before it
    padded = F.pad(white, (before, 0, before, 0), mode="circular")
    return F.avg_pool2d(padded, block, stride=1) * block


def mix_seeds(seed: int, stream: int) -> int:
    """A well spread 63-bit seed for the pair (seed, stream): splitmix64 of their combination."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + (stream + 1) * 0xD1B54A32D192ED03) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


class ImageSeeds:
    """One random generator per image, so that an image depends on its seed and not on its batch.

    `seeds`: one integer per image. `stream` separates uses of the same seed (the stages of a relay): equal
    seeds in different streams give independent noise. Drawn in float32, so that the state's precision does
    not change the noise.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", stream: int = 0) -> None:
        self.generators = [torch.Generator(device).manual_seed(mix_seeds(int(seed), stream)) for seed in seeds]

    def __len__(self) -> int:
        return len(self.generators)

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal noise like x [B,C,H,W], image i from generator i. Raises ValueError if B differs."""
        if len(x) != len(self.generators):
            raise ValueError(f"{len(self.generators)} seeds for a batch of {len(x)} images")
        noise = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        for image, generator in zip(noise, self.generators, strict=True):
            image.normal_(generator=generator)
        return noise.to(x.dtype)
