"""White and block noise in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from relay_diffusion.kernels import FUSION

TILE = 1024


@triton.jit
def add_shifts(white, other, out, height, width, BLOCK: tl.constexpr, SCALE: tl.constexpr, TILE: tl.constexpr):
    """Add circular shifts of `other` to the white noise of one channel.

    out = white + SCALE * the sum of the shifts by 0..BLOCK-1 along both axes.
    """
    image = tl.program_id(1).to(tl.int64) * height * width
    pixel = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = pixel < height * width
    row, column = pixel // width, pixel % width
    total = tl.zeros([TILE], out.dtype.element_ty)
    for i in tl.static_range(BLOCK):
        above = (row - i + height) % height * width
        for j in tl.static_range(BLOCK):
            total += tl.load(other + image + above + (column - j + width) % width, mask=inside, other=0.0)
    value = tl.load(white + image + pixel, mask=inside, other=0.0) + total * SCALE
    tl.store(out + image + pixel, value, mask=inside)


def add_block_noise(white: Tensor, other: Tensor, block: int, scale: float) -> Tensor:
    """Add the circular shifts of `other` to white noise.

    white + scale * the sum of the block x block shifts by 0..block-1; all [B,C,H,W] of one dtype.
    """
    white, other = white.contiguous(), other.contiguous()
    batch, channels, height, width = white.shape
    out = torch.empty_like(white)
    grid = (triton.cdiv(height * width, TILE), batch * channels)
    with torch.cuda.device_of(white):  # Triton launches on the current device
        add_shifts[grid](white, other, out, height, width, BLOCK=block, SCALE=scale, TILE=TILE, **FUSION)
    return out
