"""Sum at the end of a residual block, and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from relay_diffusion.kernels.group_norm import store_moments


@triton.jit
def add(
    hidden, shortcut, bias, out, moments, pixels, width, channels, rows,
    BIAS: tl.constexpr, UPSAMPLED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add hidden, bias and shortcut; measure the moments of the sum.

    The following normalization needs the moments.
    UPSAMPLED: each pixel of the shortcut counts for 2x2 pixels of hidden.
    """
    chunk, n = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    b = tl.zeros([BLOCK_C], tl.float32)
    if BIAS:
        b += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    hidden += n.to(tl.int64) * pixels * channels
    out += n.to(tl.int64) * pixels * channels
    shortcut += n.to(tl.int64) * (pixels // 4 if UPSAMPLED else pixels) * channels
    begin = chunk * rows
    end = tl.minimum(begin + rows, pixels)
    pivot = b + tl.load(hidden + begin * channels + c, mask=inside, other=0.0).to(tl.float32)
    s = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    q = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in tl.range(begin, end, BLOCK_R, num_stages=3):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & inside[None, :]
        source = row // width // 2 * (width // 2) + row % width // 2 if UPSAMPLED else row
        at = row[:, None] * channels + c[None, :]
        value = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
        value += tl.load(shortcut + source[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        value = (value + b[None, :]).to(out.dtype.element_ty)
        tl.store(out + at, value, mask=mask)
        away = tl.where(mask, value.to(tl.float32) - pivot[None, :], 0.0)  # of the rounded values stored above
        s += away
        q += away * away
    store_moments(moments, pivot, s, q, (end - begin).to(tl.float32), n, chunk, channels, c, inside)


@triton.jit
def sum_quads(x, out, pixels, width, channels, rows, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum every 2x2 pixels: the gradient of repeating them.

    `pixels` and `width` are those of out.
    """
    n = tl.program_id(2)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    x += n.to(tl.int64) * pixels * 4 * channels
    out += n.to(tl.int64) * pixels * channels
    begin = tl.program_id(1) * rows
    for start in range(begin, tl.minimum(begin + rows, pixels), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < pixels)[:, None] & inside[None, :]
        corner = row // width * (4 * width) + row % width * 2
        total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for k in tl.static_range(4):
            pixel = corner + k // 2 * (2 * width) + k % 2
            total += tl.load(x + pixel[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row[:, None] * channels + c[None, :], total.to(out.dtype.element_ty), mask=mask)
