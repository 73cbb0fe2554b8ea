"""Fused steps between convolutions on a GPU, with their gradients.

Each step is one or two passes over memory; plain torch needs five to ten. Same functions as in `networks/ops.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from relay_diffusion.kernels import FUSION
from relay_diffusion.kernels.group_norm import coefficients, moments, normalize
from relay_diffusion.kernels.group_norm_backward import gradient_coefficients, gradient_of_input, gradient_sums
from relay_diffusion.kernels.residual import add, sum_quads

# Pixels per program; these and the tile sizes below are the fastest on an H200.
ROWS = 256
SUM_ROWS = 512
MAX_CHUNKS = 128  # parts of an image whose sums are merged at once

Launch = tuple[tuple[int, int, int], dict[str, int]]
"""Grid over (channels, pixels, samples), and the tile."""


def _map(channels: int, pixels: int, samples: int) -> Launch:
    """Choose grid and tile of a kernel that writes every pixel.

    Small tiles with many threads.
    """
    block_c = 128 if channels % 128 == 0 else min(64, triton.next_power_of_2(channels))
    grid = (triton.cdiv(channels, block_c), triton.cdiv(pixels, ROWS), samples)
    rows = max(2048 // block_c, 16) if block_c >= 64 else 32
    return grid, {"BLOCK_R": rows, "BLOCK_C": block_c, "num_warps": 8} | FUSION


def _sum(channels: int, pixels: int, samples: int) -> Launch:
    """Choose grid and tile of a kernel that sums over pixels."""
    block_c = min(64, triton.next_power_of_2(channels))
    grid = (triton.cdiv(channels, block_c), triton.cdiv(pixels, _sum_rows(pixels)), samples)
    return grid, {"BLOCK_R": 64, "BLOCK_C": block_c, "num_warps": 4} | FUSION


def _sum_rows(pixels: int) -> int:
    """Return how many pixels one program sums.

    Balances the number of parts to merge against the work of each part.
    """
    return max(SUM_ROWS, triton.cdiv(triton.cdiv(pixels, MAX_CHUNKS), 64) * 64)


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (like.shape[0], channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def measure(x: Tensor) -> Tensor:
    """Compute mean and sum of squared deviations of each channel, per part.

    [N,C,H,W] -> [2,N,parts,C]; a part is a range of pixels of an image.
    """
    samples, channels, height, width = x.shape
    grid, tile = _sum(channels, height * width, samples)
    out = torch.empty(2, samples, grid[1], channels, dtype=torch.float32, device=x.device)
    moments[grid](x, out, height * width, channels, _sum_rows(height * width), **tile)
    return out


@dataclass(frozen=True)
class NormOptions:
    """Options of `Norm`."""

    groups: int
    eps: float
    silu: bool
    dropout: float  # probability of zeroing an element
    down: bool  # halve y and x


class Norm(torch.autograd.Function):
    """Group norm of concatenated inputs with modulation, SiLU and dropout.

    drop(silu(norm(cat(x, skip) + bias) (1 + scale) + shift)); also returns x and skip. `down` halves the resolution of
    the result and of x. The gradients of the returned x and skip are added in the same backward pass. Moments are those
    of `measure`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        skip: Tensor | None,
        x_moments: Tensor,
        skip_moments: Tensor | None,
        weight: Tensor,
        shift: Tensor,
        bias: Tensor | None,
        modulation: Tensor | None,
        options: NormOptions,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        samples, _, height, width = x.shape
        parts = [x] if skip is None else [x, skip]
        total = sum(part.shape[1] for part in parts)
        pixels, rows, group = height * width, _sum_rows(height * width), total // options.groups
        chunks = triton.cdiv(pixels, rows)

        coefs = torch.empty(5, samples, total, dtype=torch.float32, device=x.device)
        modulation = None if modulation is None else modulation.contiguous()
        coefficients[(options.groups, samples)](
            x_moments, skip_moments, weight, shift, bias, modulation, coefs,
            pixels, rows, chunks, x.shape[1], total, options.eps,
            GROUP=group, BLOCK_G=triton.next_power_of_2(group), BLOCK_S=triton.next_power_of_2(chunks),
            BIAS=bias is not None, MODULATION=modulation is not None, SKIP=skip is not None, **FUSION,
        )  # fmt: skip

        if options.down:
            height, width = height // 2, width // 2
        y = _empty(x, total, height, width)
        pooled = _empty(x, total, height, width) if options.down else None
        keep = 1 - options.dropout
        seed = torch.randint(2**32, (2,), device=x.device) if options.dropout else None
        drop = {"threshold": min(round(keep * 2**32), 2**32 - 1), "rate": 1 / keep}
        for offset, part in _offsets(parts):
            channels = part.shape[1]
            grid, tile = _map(channels, height * width, samples)
            normalize[grid](
                part, coefs, y, pooled, seed, height * width, width, channels, total, offset, ROWS, samples * total,
                **drop, SILU=options.silu, DROPOUT=seed is not None, HALVE=options.down, **tile,
            )  # fmt: skip
        ctx.save_for_backward(x, skip, weight, shift, bias, modulation, coefs, seed)
        ctx.group, ctx.flags, ctx.drop = group, {"SILU": options.silu, "HALVE": options.down}, drop
        ctx.set_materialize_grads(False)
        return y, x if pooled is None else pooled, skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *dshortcuts: Tensor | None) -> tuple[Any, ...]:
        x, skip, weight, shift, bias, modulation, coefs, seed = ctx.saved_tensors
        samples, _, height, width = x.shape
        parts = [x] if skip is None else [x, skip]
        total = coefs.shape[-1]
        pixels, rows, plane = height * width, _sum_rows(height * width), samples * total
        chunks = triton.cdiv(pixels, rows)
        if dy is None:  # only the shortcut was used
            halve = 2 if ctx.flags["HALVE"] else 1
            dy = torch.zeros(samples, total, height // halve, width // halve, dtype=x.dtype, device=x.device)
        dy = _channels_last(dy)

        sums = torch.empty(2, samples, chunks, total, dtype=torch.float32, device=x.device)
        options = {**ctx.drop, **ctx.flags, "DROPOUT": seed is not None}
        for offset, part in _offsets(parts):
            grid, tile = _sum(part.shape[1], pixels, samples)
            gradient_sums[grid](
                part, dy, coefs, sums, seed, pixels, width, part.shape[1], total, offset, rows, plane, **options, **tile
            )
        slopes = torch.empty(2, samples, total, dtype=torch.float32, device=x.device)
        small = torch.empty(3, samples, total, dtype=torch.float32, device=x.device)
        dmodulation = None if modulation is None else torch.empty_like(modulation)
        gradient_coefficients[(total // ctx.group, samples)](
            sums, coefs, weight, shift, modulation, slopes, dmodulation, small, pixels, chunks, total,
            GROUP=ctx.group, BLOCK_G=triton.next_power_of_2(ctx.group), BLOCK_S=triton.next_power_of_2(chunks),
            MODULATION=modulation is not None, **FUSION,
        )  # fmt: skip
        dweight, dshift, dbias = small.sum(1).unbind()

        dparts: list[Tensor | None] = [None, None]
        for k, (offset, part) in enumerate(_offsets(parts)):
            grid, tile = _map(part.shape[1], pixels, samples)
            dshortcut = dshortcuts[k]
            dparts[k] = dx = torch.empty_like(part)
            gradient_of_input[grid](
                part, dy, None if dshortcut is None else _channels_last(dshortcut), coefs, slopes, dx, seed,
                pixels, width, part.shape[1], total, offset, ROWS, plane,
                SHORTCUT=dshortcut is not None, **options, **tile,
            )  # fmt: skip
        dparameters = dweight.to(weight.dtype), dshift.to(shift.dtype), _like(dbias, bias)
        return *dparts, None, None, *dparameters, dmodulation, None


class Add(torch.autograd.Function):
    """Sum of a residual block: hidden + bias + shortcut, and its moments.

    `up`: each shortcut pixel is repeated to 2x2 pixels. Moments are those of `measure`.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shortcut: Tensor, bias: Tensor | None, up: bool) -> tuple[Tensor, Tensor]:
        samples, channels, height, width = hidden.shape
        out = torch.empty_like(hidden)
        grid, tile = _sum(channels, height * width, samples)
        moments = torch.empty(2, samples, grid[1], channels, dtype=torch.float32, device=hidden.device)
        add[grid](
            hidden, shortcut, bias, out, moments, height * width, width, channels, _sum_rows(height * width),
            BIAS=bias is not None, UPSAMPLED=up, **tile,
        )  # fmt: skip
        ctx.save_for_backward(bias)
        ctx.up = up
        ctx.mark_non_differentiable(moments)
        return out, moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (bias,) = ctx.saved_tensors
        dout = _channels_last(dout)
        dbias = None if bias is None else dout.sum((0, 2, 3), dtype=torch.float32)
        dshortcut = dout
        if ctx.up:
            samples, channels, height, width = dout.shape
            dshortcut = _empty(dout, channels, height // 2, width // 2)
            grid, tile = _map(channels, height * width // 4, samples)
            sum_quads[grid](dout, dshortcut, height * width // 4, width // 2, channels, ROWS, **tile)
        return dout, dshortcut, _like(dbias, bias), None


class QueryKeyValue(torch.autograd.Function):
    """Linear projection to query, key and value.

    x W^T + b in three parts: pixels [B,L,C] -> q, k, v [B,L,C] each. Forward is one matrix product; backward uses the
    three gradients of attention without concatenating them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        ctx.bias_type = bias.dtype
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype)).chunk(3, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        parts = [gradient.reshape(-1, x.shape[-1]) for gradient in gradients]
        rows, weights = x.reshape(-1, x.shape[-1]), weight.to(x.dtype).chunk(3)
        dx = parts[0] @ weights[0]
        for part, matrix in zip(parts[1:], weights[1:], strict=True):
            dx.addmm_(part, matrix)
        dweight = torch.cat([part.T @ rows for part in parts])
        dbias = torch.cat([part.sum(0, dtype=torch.float32) for part in parts])
        return dx.view_as(x), dweight.to(weight.dtype), dbias.to(ctx.bias_type)


def _offsets(parts: list[Tensor]) -> list[tuple[int, Tensor]]:
    """Return each part with its first channel in the concatenation."""
    return [(sum(before.shape[1] for before in parts[:k]), part) for k, part in enumerate(parts)]


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)
