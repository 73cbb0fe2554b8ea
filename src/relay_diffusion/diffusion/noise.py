"""White and block noise, and one random stream per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from relay_diffusion.kernels import HAVE_TRITON

RandnLike = Callable[[Tensor], Tensor]
"""Draws standard normal noise of the shape, dtype and device of its argument."""


AHEAD = {"cuda": 4}
"""Draws of each image made at once, by device (others: 1): launching a kernel takes longer than drawing an image.

It is part of what a seed means there. On the CPU the noise of a seed is that of single draws.
"""


KERNEL_BLOCK = 8  # the kernel reads block^2 neighbours of each pixel; doubling windows are better for larger blocks


def _window_sum(x: Tensor, length: int, dim: int) -> Tensor:
    """Sums of `length` neighbours along `dim`, which gets length - 1 shorter; windows are built by doubling."""
    if length == 1:
        return x
    joined = length // 2 if length % 2 == 0 else 1  # a window of even length is two halves, an odd one has one more
    window = _window_sum(x, length - joined, dim)
    size = x.shape[dim] - length + 1
    other = window if joined > 1 or length == 2 else x
    return window.narrow(dim, 0, size) + other.narrow(dim, length - joined, size)


def block_sum(white: Tensor, block: int) -> Tensor:
    """The sum of block x block circular shifts, by 0..block-1 along both axes: [B,C,H,W] -> [B,C,H,W]."""
    total = white
    for dim in (-2, -1):  # every pixel sees itself and what lies before it
        before = total.narrow(dim, total.shape[dim] - block + 1, block - 1)
        total = _window_sum(torch.cat([before, total], dim), block, dim)
    return total


def block_noise(white: Tensor, block: int) -> Tensor:
    """Noise that is alike within `block` pixels: the sum of block x block circular shifts of white noise, over block.

    [B,C,H,W] -> [B,C,H,W]. Unit variance; pixels at distance (dx, dy) correlate by
    max(0, s-|dx|)/s * max(0, s-|dy|)/s. A circular box filter computes it (Teng et al., section 3.2).
    """
    return block_sum(white, block) / block


def add_block_noise(white: Tensor, other: Tensor, block: int, strength: float) -> Tensor:
    """white + strength * block_noise(other), all [B,C,H,W]; on a GPU in one pass."""
    scale = strength / block
    if HAVE_TRITON and white.is_cuda and block <= KERNEL_BLOCK:
        from relay_diffusion.kernels.noise import add_block_noise as in_one_pass

        return in_one_pass(white, other, block, scale)
    return torch.add(white, block_sum(other, block), alpha=scale)


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
        self._drawn: list[Tensor] = []  # ahead of their use, the next one last

    def __len__(self) -> int:
        return len(self.generators)

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal noise like x [B,C,H,W], image i from generator i. Raises ValueError if B differs."""
        if len(x) != len(self.generators):
            raise ValueError(f"{len(self.generators)} seeds for a batch of {len(x)} images")
        if not self._drawn or self._drawn[-1].shape != x.shape:
            self._drawn = self._draw(x)
        return self._drawn.pop().to(x.dtype, memory_format=torch.contiguous_format)

    def _draw(self, x: Tensor) -> list[Tensor]:
        ahead = AHEAD.get(x.device.type, 1)
        noise = torch.empty(len(x), ahead, *x.shape[1:], dtype=torch.float32, device=x.device)
        for image, generator in zip(noise, self.generators, strict=True):
            image.normal_(generator=generator)
        return list(noise.unbind(1))[::-1]
