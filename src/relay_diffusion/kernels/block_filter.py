"""Block blur and noise in one pass over memory."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from relay_diffusion.kernels import FUSION

PIECES = 64  # blocks per program


@triton.jit
def filter_pieces(
    x, matrix, factors, noise, out, height, width, channels,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Filter the blocks of one channel in DCT space and add noise.

    out = M^T G M x + scale * noise for each BLOCK x BLOCK piece, with its DCT M [BLOCK^2, BLOCK^2].
    factors [N, BLOCK^2 + 1]: the diagonal of G, and the scale.
    """
    sample = tl.program_id(1) // channels
    image = tl.program_id(1).to(tl.int64) * height * width
    piece = tl.program_id(0) * PIECES + tl.arange(0, PIECES)
    k = tl.arange(0, SIZE)  # pixels or coefficients of a piece, padded: tl.dot needs at least 16
    inside = k < BLOCK * BLOCK
    across = width // BLOCK
    corner = piece // across * (BLOCK * width) + piece % across * BLOCK
    at = image + corner[:, None] + (k // BLOCK * width + k % BLOCK)[None, :]
    mask = (piece < height // BLOCK * across)[:, None] & inside[None, :]
    both = inside[:, None] & inside[None, :]
    transform = tl.load(matrix + k[:, None] * BLOCK * BLOCK + k[None, :], mask=both, other=0.0)
    factors += sample * (BLOCK * BLOCK + 1)
    gain = tl.load(factors + k, mask=inside, other=0.0)
    pixels = tl.load(x + at, mask=mask, other=0.0)
    coefficients = tl.dot(pixels, tl.trans(transform), input_precision="ieee") * gain[None, :]
    blurred = tl.dot(coefficients, transform, input_precision="ieee")
    value = blurred + tl.load(factors + BLOCK * BLOCK) * tl.load(noise + at, mask=mask, other=0.0)
    tl.store(out + at, value, mask=mask)


def filter_and_add(x: Tensor, matrix: Tensor, factors: Tensor, noise: Tensor) -> Tensor:
    """Filter images by blocks in DCT space and add noise.

    x, noise [B,C,H,W], matrix: DCT of a piece [s^2,s^2], factors [B,s^2+1]: gains and noise scale; all float32.
    Returns [B,C,H,W].
    """
    x, noise = x.contiguous(), noise.contiguous()
    batch, channels, height, width = x.shape
    block = math.isqrt(len(matrix))
    out = torch.empty_like(x)
    grid = (triton.cdiv(height * width, block**2 * PIECES), batch * channels)
    size = max(16, triton.next_power_of_2(block**2))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        filter_pieces[grid](
            x, matrix, factors, noise, out, height, width, channels, BLOCK=block, SIZE=size, PIECES=PIECES, **FUSION
        )
    return out
