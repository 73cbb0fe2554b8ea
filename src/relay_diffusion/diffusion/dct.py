"""Orthonormal block DCT-II and its inverse, as matrix products.

An image is cut into `block` x `block` pieces; each piece X becomes M X M^T, with
M[k, n] = c_k cos(pi k (2n + 1) / (2 block)), c_0 = sqrt(1/block), c_k = sqrt(2/block).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from relay_diffusion.diffusion.tensors import by_channel
from relay_diffusion.kernels import HAVE_TRITON

SMALL_BLOCK = 8  # up to this size one product with a block^2 x block^2 matrix is faster than four with block x block


@lru_cache(maxsize=64)
def dct_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the orthonormal DCT-II matrix M [size, size].

    Rows are frequencies; M M^T = 1.
    """
    with torch.inference_mode(False):  # cached, and used in training too
        n = torch.arange(size, dtype=torch.float64, device="cpu")
        matrix = torch.cos(math.pi / size * n[:, None] * (n[None, :] + 0.5)) * math.sqrt(2 / size)
        matrix[0] = math.sqrt(1 / size)
        return matrix.to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def _dct_matrix_of_pieces(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the DCT matrix of a piece in row-major order.

    [size^2, size^2]: vec(M X M^T) = (M kron M) vec(X).
    """
    with torch.inference_mode(False):
        matrix = dct_matrix(size, torch.float64, torch.device("cpu"))
        return torch.kron(matrix, matrix).to(device=device, dtype=dtype)


def check_blocks(x: Tensor, block: int) -> None:
    """Raise ValueError if the images are not divisible into blocks."""
    height, width = x.shape[-2:]
    if height % block or width % block:
        raise ValueError(f"images of {height}x{width} do not divide into blocks of {block}x{block}")


def _per_block(x: Tensor, block: int, dtype: torch.dtype, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `transform` to all pieces of an image batch.

    x [B,C,H,W] -> pieces [B, block, block, N] -> [B,C,H,W] in `dtype`.
    """
    check_blocks(x, block)
    height, width = x.shape[-2:]
    # On a GPU the products are in float64, which neither TF32 nor autocast affects. It needs no extra pass: the copies
    # that rearrange the pixels also convert them.
    precision = torch.float64 if x.is_cuda else dtype
    pieces = x.view(*x.shape[:2], height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    columns = pieces.to(precision, memory_format=torch.contiguous_format).flatten(3)
    with torch.autocast(x.device.type, enabled=False):  # keep the blur exact in mixed precision
        transformed = transform(columns).view(pieces.shape).permute(0, 3, 4, 1, 5, 2)
    return transformed.to(dtype, memory_format=torch.contiguous_format).reshape(x.shape)


def _both_axes(matrix: Tensor, pieces: Tensor) -> Tensor:
    """Compute M X M^T of every piece [B, block, block, N]."""
    rows = (matrix @ pieces.flatten(2)).view(pieces.shape)
    return matrix @ rows


def block_dct(x: Tensor, block: int) -> Tensor:
    """Compute the DCT-II of every block x block piece.

    [B,C,H,W] -> [B,C,H,W], coefficients in the place of their piece.
    Raises ValueError if H or W is not a multiple of `block`.
    """
    return _transform(x, block, dct_matrix)


def block_idct(coefficients: Tensor, block: int) -> Tensor:
    """Invert `block_dct`: [B,C,H,W] -> [B,C,H,W]."""
    return _transform(coefficients, block, lambda *options: dct_matrix(*options).mT)


def _transform(x: Tensor, block: int, matrix: Callable[[int, torch.dtype, torch.device], Tensor]) -> Tensor:
    def both_axes(pieces: Tensor) -> Tensor:
        return _both_axes(matrix(block, pieces.dtype, pieces.device), pieces)

    return _per_block(x, block, x.dtype, both_axes)


def block_filter(x: Tensor, gains: Tensor) -> Tensor:
    """Multiply the DCT coefficients of every block by gains.

    x [B,C,H,W], gains [B or 1, 1, block, block] -> a new tensor [B,C,H,W], in the wider precision of the two.
    Raises ValueError if H or W is not a multiple of `block`.
    """
    block = gains.shape[-1]
    if block == 1:
        return x * gains

    def one_product(pieces: Tensor) -> Tensor:
        dct = _dct_matrix_of_pieces(block, pieces.dtype, pieces.device)
        matrix = dct.mT @ (gains.to(pieces, non_blocking=True).reshape(-1, block**2, 1) * dct)
        return matrix.expand(len(pieces), -1, -1) @ pieces.flatten(1, 2)

    def axis_by_axis(pieces: Tensor) -> Tensor:
        matrix = dct_matrix(block, pieces.dtype, pieces.device)
        coefficients = _both_axes(matrix, pieces) * gains.to(pieces, non_blocking=True).squeeze(1)[..., None]
        return _both_axes(matrix.mT, coefficients)

    dtype = torch.promote_types(x.dtype, gains.dtype)
    transform = one_product if block <= SMALL_BLOCK else axis_by_axis
    return by_channel(lambda channels: _per_block(channels, block, dtype, transform), x)


def filter_and_add(x: Tensor, gains: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Compute block_filter(x, gains) + scale * noise.

    x and noise [B,C,H,W], gains [B,1,block,block], scale [B]; one pass over memory on a GPU.
    Raises ValueError if H or W is not a multiple of the block.
    """
    block = gains.shape[-1]
    check_blocks(x, block)
    if HAVE_TRITON and x.is_cuda and x.dtype == gains.dtype == noise.dtype == torch.float32 and block <= SMALL_BLOCK:
        from relay_diffusion.kernels.block_filter import filter_and_add as in_one_pass

        gains = gains.reshape(-1, block**2).expand(len(x), -1)
        sent = torch.cat([gains, scale[:, None]], dim=1).to(x.device, non_blocking=True)  # one copy instead of two
        return in_one_pass(x, _dct_matrix_of_pieces(block, x.dtype, x.device), sent, noise)
    scale = scale.view(-1, 1, 1, 1).to(x.device, non_blocking=True)
    return torch.addcmul(block_filter(x, gains), scale, noise)
