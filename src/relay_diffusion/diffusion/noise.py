"""White noise and block noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from relay_diffusion.diffusion.tensors import by_channel
from relay_diffusion.kernels import HAVE_TRITON

RandnLike = Callable[[Tensor], Tensor]
"""Draws standard normal noise of the shape, dtype and device of its argument."""


AHEAD = {"cuda": 4}
"""Draws of each image made at once, by device (others: 1): launching a kernel takes longer than drawing an image.

It is part of what a seed means there. On the CPU the noise of a seed is that of single draws.
"""


KERNEL_BLOCK = 8  # the kernel reads block^2 neighbors of each pixel; doubled windows are faster for larger blocks


def _window_sum(x: Tensor, length: int, dim: int) -> Tensor:
    """Sum `length` neighbors along `dim`, by doubling windows.

    `dim` gets length - 1 shorter.
    """
    if length == 1:
        return x
    joined = length // 2 if length % 2 == 0 else 1  # an odd window adds one pixel to an even one
    window = _window_sum(x, length - joined, dim)
    size = x.shape[dim] - length + 1
    other = window if joined > 1 or length == 2 else x
    return window.narrow(dim, 0, size) + other.narrow(dim, length - joined, size)


def block_sum(white: Tensor, block: int) -> Tensor:
    """Sum the block x block circular shifts: [B,C,H,W] -> [B,C,H,W].

    Shifts are 0..block-1 along both axes.
    """
    total = white
    for dim in (-2, -1):  # each window ends at its pixel (circular padding in front)
        before = total.narrow(dim, total.shape[dim] - block + 1, block - 1)
        total = _window_sum(torch.cat([before, total], dim), block, dim)
    return total


def block_noise(white: Tensor, block: int) -> Tensor:
    """Block noise: white noise averaged so that it correlates within blocks.

    The sum of block x block circular shifts of white noise, over block: [B,C,H,W] -> [B,C,H,W]. Unit variance; pixels
    at distance (dx, dy) correlate by max(0, s-|dx|)/s * max(0, s-|dy|)/s. A circular box filter computes it
    (Teng et al. 2024, section 3.2).
    """
    return block_sum(white, block) / block


def add_block_noise(white: Tensor, other: Tensor, block: int, strength: float) -> Tensor:
    """Compute white + strength * block_noise(other), all [B,C,H,W].

    One pass over memory on a GPU.
    """
    scale = strength / block
    if HAVE_TRITON and white.is_cuda and block <= KERNEL_BLOCK:
        from relay_diffusion.kernels.block_noise import add_block_noise as in_one_pass

        return in_one_pass(white, other, block, scale)
    return by_channel(lambda some, more: torch.add(some, block_sum(more, block), alpha=scale), white, other)
