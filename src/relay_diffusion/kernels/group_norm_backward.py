"""Gradient kernels of fused group normalization (`kernels/group_norm.py`)."""

from __future__ import annotations

import triton
import triton.language as tl

from relay_diffusion.kernels.group_norm import kept, last_first, sample_keys


@triton.jit
def gradient_before(
    value, dy, row, c, mask, mu, a, d, key0, key1, width, channels, total, threshold, rate,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, HALVE: tl.constexpr,
):  # fmt: skip
    """Compute the gradient with respect to z = (x - mu) a + d.

    At the pixels of x, from the gradient dy of y.
    """
    if HALVE:
        parent = row // width // 2 * (width // 2) + row % width // 2
        g = 0.25 * tl.load(dy + parent[:, None] * total + c[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        g = tl.load(dy + row[:, None] * total + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        keep = kept(row[:, None] * channels + c[None, :], key0, key1, threshold)
        g = tl.where(keep, g * rate, 0.0)
    if SILU:
        z = (value - mu) * a + d
        s = tl.sigmoid(z)
        g = g * s * (1.0 + z * (1.0 - s))
    return g


@triton.jit
def gradient_sums(
    x, dy, coefs, sums, seed, pixels, width, channels, total, offset, rows, plane, threshold, rate,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, HALVE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum dz and dz (x - mu) over every `rows` pixels.

    Per channel: [2, N, chunks, total].
    """
    chunk, n = tl.program_id(1), last_first()
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    here = coefs + n * total + offset + c
    mu = tl.load(here, mask=inside, other=0.0)[None, :]
    a = tl.load(here + plane, mask=inside, other=0.0)[None, :]
    d = tl.load(here + 2 * plane, mask=inside, other=0.0)[None, :]
    x += n.to(tl.int64) * pixels * channels
    dy += n.to(tl.int64) * (pixels // 4 if HALVE else pixels) * total + offset
    key0, key1 = sample_keys(seed, n) if DROPOUT else (0, 0)
    p = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    q = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    begin = chunk * rows
    end = tl.minimum(begin + rows, pixels)
    for start in tl.range(begin, end, BLOCK_R, num_stages=3):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & inside[None, :]
        value = tl.load(x + row[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        g = gradient_before(
            value, dy, row, c, mask, mu, a, d, key0, key1, width, channels, total, threshold, rate,
            SILU, DROPOUT, HALVE,
        )  # fmt: skip
        p += g
        q += g * (value - mu)
    chunks = tl.num_programs(1)
    at = (n * chunks + chunk) * total + offset + c
    tl.store(sums + at, tl.sum(p, 0), mask=inside)
    tl.store(sums + tl.num_programs(2) * chunks * total + at, tl.sum(q, 0), mask=inside)


@triton.jit
def gradient_coefficients(
    sums, coefs, weight, shift, modulation, out, dmodulation, dparameters,
    pixels, chunks, total,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, MODULATION: tl.constexpr,
):  # fmt: skip
    """Compute the coefficients of dx and the parameter gradients of one group.

    For one sample: dx = a dz + out[0] (x - mu) + out[1], out [2, N, total]. dparameters [3, N, total]: gradients of
    weight, shift and the preceding bias, for each sample. dmodulation [N, 2 total].
    """
    n, samples = tl.program_id(1), tl.num_programs(1)
    plane = samples * total
    k = tl.arange(0, BLOCK_G)
    c = tl.program_id(0) * GROUP + k
    inside = k < GROUP
    s = tl.arange(0, BLOCK_S)
    mask = (s < chunks)[:, None] & inside[None, :]
    at = (n * chunks + s[:, None]) * total + c[None, :]
    p = tl.sum(tl.load(sums + at, mask=mask, other=0.0), 0)
    q = tl.sum(tl.load(sums + samples * chunks * total + at, mask=mask, other=0.0), 0)
    here = n * total + c
    mu = tl.load(coefs + here, mask=inside, other=0.0)
    a = tl.load(coefs + plane + here, mask=inside, other=0.0)
    inverse = tl.load(coefs + 3 * plane + here, mask=inside, other=0.0)
    channel_mean = tl.load(coefs + 4 * plane + here, mask=inside, other=0.0)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    scale = tl.full([BLOCK_G], 1.0, tl.float32)
    if MODULATION:
        scale += tl.load(modulation + n * 2 * total + c, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(shift + c, mask=inside, other=0.0).to(tl.float32)
        dscale = w * inverse * q + b * p
        kind = dmodulation.dtype.element_ty
        tl.store(dmodulation + n * 2 * total + c, dscale.to(kind), mask=inside)
        tl.store(dmodulation + n * 2 * total + total + c, p.to(kind), mask=inside)
    size = GROUP * pixels
    first = tl.sum(w * scale * p, 0) / size
    second = tl.sum(w * scale * inverse * q, 0) / size
    slope = -inverse * inverse * second
    level = -inverse * first
    tl.store(out + here, slope, mask=inside)
    tl.store(out + plane + here, level, mask=inside)
    tl.store(dparameters + here, scale * inverse * q, mask=inside)
    tl.store(dparameters + plane + here, scale * p, mask=inside)
    # gradient of the bias added before x: the sum of dx over the pixels, in closed form
    tl.store(dparameters + 2 * plane + here, a * p + pixels * (slope * (channel_mean - mu) + level), mask=inside)


@triton.jit
def gradient_of_input(
    x, dy, dshortcut, coefs, slopes, dx, seed,
    pixels, width, channels, total, offset, rows, plane, threshold, rate,
    SHORTCUT: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr, HALVE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute dx = a dz + slope (x - mu) + level for one tile.

    SHORTCUT: adds the gradient of the shortcut.
    """
    n = tl.program_id(2)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    here = n * total + offset + c
    mu = tl.load(coefs + here, mask=inside, other=0.0)[None, :]
    a = tl.load(coefs + plane + here, mask=inside, other=0.0)[None, :]
    d = tl.load(coefs + 2 * plane + here, mask=inside, other=0.0)[None, :]
    slope = tl.load(slopes + here, mask=inside, other=0.0)[None, :]
    level = tl.load(slopes + plane + here, mask=inside, other=0.0)[None, :]
    x += n.to(tl.int64) * pixels * channels
    dx += n.to(tl.int64) * pixels * channels
    dy += n.to(tl.int64) * (pixels // 4 if HALVE else pixels) * total + offset
    if SHORTCUT:
        dshortcut += n.to(tl.int64) * (pixels // 4 if HALVE else pixels) * channels
    key0, key1 = sample_keys(seed, n) if DROPOUT else (0, 0)
    begin = tl.program_id(1) * rows
    for start in range(begin, tl.minimum(begin + rows, pixels), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < pixels)[:, None] & inside[None, :]
        value = tl.load(x + row[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        g = gradient_before(
            value, dy, row, c, mask, mu, a, d, key0, key1, width, channels, total, threshold, rate,
            SILU, DROPOUT, HALVE,
        )  # fmt: skip
        out = a * g + slope * (value - mu) + level
        if SHORTCUT:
            if HALVE:
                parent = row // width // 2 * (width // 2) + row % width // 2
                out += 0.25 * tl.load(
                    dshortcut + parent[:, None] * channels + c[None, :], mask=mask, other=0.0
                ).to(tl.float32)  # fmt: skip
            else:
                out += tl.load(dshortcut + row[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row[:, None] * channels + c[None, :], out.to(dx.dtype.element_ty), mask=mask)
