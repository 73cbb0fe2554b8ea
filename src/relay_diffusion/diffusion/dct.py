"""Orthonormal block DCT-II and its inverse, as matrix products.

A picture is cut into `block` x `block` pieces; each piece X becomes M X M^T, with
M[k, n] = c_k cos(pi k (2n + 1) / (2 block)), c_0 = sqrt(1/block), c_k = sqrt(2/block).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor


@lru_cache(maxsize=64)
def dct_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal DCT-II matrix M [size, size]: rows are frequencies; M M^T = 1."""
    with torch.inference_mode(False):  # kept between calls: it must serve training too
        n = torch.arange(size, dtype=torch.float64, device="cpu")
        matrix = torch.cos(math.pi / size * n[:, None] * (n[None, :] + 0.5)) * math.sqrt(2 / size)
        matrix[0] = math.sqrt(1 / size)
        return matrix.to(device=device, dtype=dtype)


def _per_block(x: Tensor, block: int, matrix: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    if height % block or width % block:
        raise ValueError(f"images of {height}x{width} do not divide into blocks of {block}x{block}")
    patches = rearrange(x, "... (h s) (w t) -> ... h w s t", s=block, t=block)
    with torch.autocast(x.device.type, enabled=False):  # the blur is exact also in mixed precision
        filtered = matrix @ patches @ matrix.mT
    return rearrange(filtered, "... h w s t -> ... (h s) (w t)")


def block_dct(x: Tensor, block: int) -> Tensor:
    """DCT-II of every block x block piece: [B,C,H,W] -> [B,C,H,W], coefficients in the place of their piece.

    Raises ValueError if H or W is not a multiple of `block`.
    """
    return _per_block(x, block, dct_matrix(block, x.dtype, x.device))


def block_idct(coefficients: Tensor, block: int) -> Tensor:
    """Inverse of `block_dct`: [B,C,H,W] -> [B,C,H,W]."""
    return _per_block(coefficients, block, dct_matrix(block, coefficients.dtype, coefficients.device).mT)


def block_filter(x: Tensor, gains: Tensor) -> Tensor:
    """Multiply the DCT coefficients of every block by `gains` [B or 1, 1, block, block]: [B,C,H,W] -> [B,C,H,W]."""
    block = gains.shape[-1]
    tiles = gains.repeat(1, 1, x.shape[-2] // block, x.shape[-1] // block)
    return block_idct(block_dct(x, block) * tiles, block)
