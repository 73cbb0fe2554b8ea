"""Fused group normalization, modulation, SiLU and dropout.

y = drop(silu((x - mu) a + d)). mu, a and d, for each sample and channel, combine the statistics, the weights, the
scale and shift from the embedding, and the bias of the preceding convolution, which then needs no separate pass.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def last_first():
    """Return the sample of this program, in reverse order.

    The previous kernel wrote the last sample last, so it is still in the cache.
    """
    return tl.num_programs(2) - 1 - tl.program_id(2)


@triton.jit
def store_moments(out, pivot, s, q, count, n, chunk, channels, c, inside):
    """Store the mean and sum of squared deviations of a chunk.

    s, q: sums of the deviations from `pivot` and of their squares. out [2, N, chunks, C].
    """
    first, second = tl.sum(s, 0), tl.sum(q, 0)
    samples, chunks = tl.num_programs(2), tl.num_programs(1)
    at = (n * chunks + chunk) * channels + c
    tl.store(out + at, pivot + first / count, mask=inside)
    tl.store(out + samples * chunks * channels + at, second - first * first / count, mask=inside)


@triton.jit
def moments(x, out, pixels, channels, rows, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Compute mean and sum of squared deviations of every `rows` pixels.

    Per channel: [2, N, chunks, C]. Sums are taken about the chunk's first pixel, so a large mean loses no precision.
    """
    chunk, n = tl.program_id(1), last_first()
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    begin = chunk * rows
    end = tl.minimum(begin + rows, pixels)
    x += n.to(tl.int64) * pixels * channels
    pivot = tl.load(x + begin * channels + c, mask=inside, other=0.0).to(tl.float32)
    s = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    q = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in tl.range(begin, end, BLOCK_R, num_stages=3):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & inside[None, :]
        value = tl.load(x + row[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value - pivot[None, :], 0.0)
        s += value
        q += value * value
    store_moments(out, pivot, s, q, (end - begin).to(tl.float32), n, chunk, channels, c, inside)


@triton.jit
def coefficients(
    moments, skip_moments, weight, shift, bias, modulation, out,
    pixels, rows, chunks, channels, total, eps,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    BIAS: tl.constexpr, MODULATION: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Compute the normalization coefficients of one group of one sample.

    out [5, N, total]: mu, a, d, 1/deviation and the channel's mean.
    SKIP: the channels from `channels` on are those of skip_moments.
    """
    n, samples = tl.program_id(1), tl.num_programs(1)
    k = tl.arange(0, BLOCK_G)
    c = tl.program_id(0) * GROUP + k
    inside = k < GROUP
    s = tl.arange(0, BLOCK_S)
    mask = (s < chunks)[:, None] & inside[None, :]
    count = tl.where(s < chunks, tl.minimum(rows, pixels - s * rows), 0).to(tl.float32)[:, None]
    chunk = (n * chunks + s)[:, None]
    here = mask & (c < channels)[None, :]
    at = chunk * channels + c[None, :]
    mean = tl.load(moments + at, mask=here, other=0.0)
    squares = tl.load(moments + samples * chunks * channels + at, mask=here, other=0.0)
    if SKIP:
        there = mask & (c >= channels)[None, :]
        at = chunk * (total - channels) + (c - channels)[None, :]
        mean += tl.load(skip_moments + at, mask=there, other=0.0)
        squares += tl.load(skip_moments + samples * chunks * (total - channels) + at, mask=there, other=0.0)
    channel_mean = tl.sum(mean * count, 0) / pixels
    away = tl.where(mask, mean - channel_mean[None, :], 0.0)
    channel_squares = tl.sum(squares + away * away * count, 0)
    before = tl.zeros([BLOCK_G], tl.float32)
    if BIAS:
        before += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    level = tl.where(inside, channel_mean + before, 0.0)
    group_mean = tl.sum(level, 0) / GROUP
    away_c = tl.where(inside, level - group_mean, 0.0)
    variance = tl.sum(channel_squares + away_c * away_c * pixels, 0) / (GROUP * pixels)
    inverse = 1.0 / tl.sqrt(variance + eps)
    a = inverse * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(shift + c, mask=inside, other=0.0).to(tl.float32)
    if MODULATION:
        scale = 1.0 + tl.load(modulation + n * 2 * total + c, mask=inside, other=0.0).to(tl.float32)
        a *= scale
        d = d * scale + tl.load(modulation + n * 2 * total + total + c, mask=inside, other=0.0).to(tl.float32)
    plane = samples * total
    out += n * total + c
    tl.store(out, group_mean - before, mask=inside)
    tl.store(out + plane, a, mask=inside)
    tl.store(out + 2 * plane, d, mask=inside)
    tl.store(out + 3 * plane, inverse + tl.zeros([BLOCK_G], tl.float32), mask=inside)
    tl.store(out + 4 * plane, channel_mean, mask=inside)


@triton.jit
def kept(index, key0, key1, threshold):
    """Return the dropout mask: a hash of the element's index below the threshold.

    The threshold is a fraction of 2^32. The hash has rounds of xor-shift-multiply with a key in each of the first two,
    so that masks of different calls are not shifted copies of each other; without the third round, elements at
    distances of high powers of two would be correlated.
    """
    v = (index.to(tl.uint32) ^ key0) * 0x7FEB352D
    v = ((v ^ (v >> 15)) ^ key1) * 0x846CA68B
    return (v ^ (v >> 16)) * 0x9E3779B1 < threshold


@triton.jit
def sample_keys(seed, n):
    """Derive a sample's two 32-bit keys from the call's seed [2]."""
    key0 = tl.load(seed).to(tl.uint32) + n.to(tl.uint32) * 0x9E3779B9
    key1 = tl.load(seed + 1).to(tl.uint32) ^ (n.to(tl.uint32) * 0x85EBCA6B)
    return key0, key1


@triton.jit
def normalize(
    x, coefs, y, pooled, seed, pixels, width, channels, total, offset, rows, plane, threshold, rate,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, HALVE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute y = drop(silu((x - mu) a + d)) for one tile.

    Writes the channels from `offset` of y's `total` channels; `pixels` and `width` are those of y.
    HALVE: y is the mean over 2x2 pixels, and `pooled` the mean of x.
    """
    n = tl.program_id(2)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    here = coefs + n * total + offset + c
    mu = tl.load(here, mask=inside, other=0.0)[None, :]
    a = tl.load(here + plane, mask=inside, other=0.0)[None, :]
    d = tl.load(here + 2 * plane, mask=inside, other=0.0)[None, :]
    x += n.to(tl.int64) * (4 * pixels if HALVE else pixels) * channels
    y += n.to(tl.int64) * pixels * total + offset
    if HALVE:
        pooled += n.to(tl.int64) * pixels * channels
    if DROPOUT:
        key0, key1 = sample_keys(seed, n)
    begin = tl.program_id(1) * rows
    for start in range(begin, tl.minimum(begin + rows, pixels), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < pixels)[:, None] & inside[None, :]
        if HALVE:
            corner = row // width * (4 * width) + row % width * 2
            out = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
            mean = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
            for k in tl.static_range(4):
                pixel = corner + k // 2 * (2 * width) + k % 2
                value = tl.load(x + pixel[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
                z = (value - mu) * a + d
                if SILU:
                    z = z * tl.sigmoid(z)
                out += z * 0.25
                mean += value * 0.25
            tl.store(pooled + row[:, None] * channels + c[None, :], mean.to(pooled.dtype.element_ty), mask=mask)
        else:
            value = tl.load(x + row[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
            out = (value - mu) * a + d
            if SILU:
                out = out * tl.sigmoid(out)
            if DROPOUT:
                keep = kept(row[:, None] * channels + c[None, :], key0, key1, threshold)
                out = tl.where(keep, out * rate, 0.0)
        tl.store(y + row[:, None] * total + c[None, :], out.to(y.dtype.element_ty), mask=mask)
