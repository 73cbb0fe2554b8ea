"""Replacement of non-finite values in many tensors, and their norm.

One kernel reads all tensors once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from relay_diffusion.kernels import FUSION

BLOCK = 2048
CHUNK = 16 * BLOCK  # elements per program


@triton.jit
def replace(pointers, sizes, tensors, chunks, count, squares, limit, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Replace and count the non-finite values of one chunk.

    Program i reads chunk chunks[i] of tensor tensors[i]; NaN becomes 0, infinities +-limit. It also sums the squares of
    all values afterwards.
    """
    tensor = tl.load(tensors + tl.program_id(0))
    begin = tl.load(chunks + tl.program_id(0)) * CHUNK
    size = tl.load(sizes + tensor) - begin
    values = tl.load(pointers + tensor).to(tl.pointer_type(tl.float32)) + begin
    found = tl.zeros([BLOCK], tl.int32)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(values + at, mask=at < size, other=0.0)
        bad = (tl.abs(value) <= 3.4028234663852886e38) == 0  # false for NaN too
        fixed = tl.where(value > 0, limit, tl.where(value < 0, -limit, 0.0))
        tl.store(values + at, fixed, mask=bad & (at < size))
        found += bad.to(tl.int32)
        value = tl.where(bad, fixed, value)
        square += value * value
    total = tl.sum(found, 0)
    if total > 0:
        tl.atomic_add(count, total.to(tl.int64))
    tl.store(squares + tl.program_id(0), tl.sum(square, 0))


@lru_cache(maxsize=8)
def _work(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensor sizes and the tensor and chunk of each program.

    All on the device.
    """
    programs = [(i, chunk) for i, size in enumerate(sizes) for chunk in range(triton.cdiv(size, CHUNK))]
    tensors, chunks = torch.tensor(programs, dtype=torch.int64).T.contiguous().unbind()
    return torch.tensor(sizes, device=device), tensors.to(device), chunks.to(device)


def replace_all(gradients: Sequence[Tensor], limit: float) -> tuple[Tensor, Tensor]:
    """Replace NaN by 0 and infinities by +-limit, in place.

    gradients: dense float32 tensors. Returns the number of replaced values and the L2 norm of all values afterwards, on
    the device.
    """
    device = gradients[0].device
    sizes, tensors, chunks = _work(tuple(gradient.numel() for gradient in gradients), device)
    addresses = torch.tensor([gradient.data_ptr() for gradient in gradients], pin_memory=device.type == "cuda")
    pointers = addresses.to(device, non_blocking=True)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    squares = torch.empty(len(tensors), device=device)
    with torch.cuda.device_of(count):  # Triton launches on the current device
        replace[(len(tensors),)](
            pointers, sizes, tensors, chunks, count, squares, limit, CHUNK=CHUNK, BLOCK=BLOCK, **FUSION
        )
    return count[0], squares.sum().sqrt()
